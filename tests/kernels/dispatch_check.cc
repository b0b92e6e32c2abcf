// Chooses among made-up tiers, as on a CPU that lacks the best one. Compiled and run by test_native.py.
#include "dispatch.h"

#include <cstdio>
#include <cstdlib>

namespace dsformer {
const OmpTier omp_scalar{}, omp_avx2{}, omp_avx512{};
const DsLinearTier ds_linear_scalar{}, ds_linear_avx2{}, ds_linear_avx512{}, ds_linear_avx512vnni{},
    ds_linear_avx512vbmi{};
const AttentionTier attention_scalar{}, attention_avx2{}, attention_avx512{}, attention_avx512bf16{};
}  // namespace dsformer

static void expect(const char* forced, const char* name, const char* message) {
  const dsformer::Tier tiers[] = {{"best", "feature X", [] { return false; }, nullptr, nullptr, nullptr},
                                  {"middle", "feature Y", [] { return true; }, nullptr, nullptr, nullptr},
                                  {"scalar", "nothing", [] { return true; }, nullptr, nullptr, nullptr}};
  std::string got;
  const dsformer::Tier* tier = dsformer::choose(forced, tiers, 3, &got);
  const std::string got_name = tier ? tier->name : "none";
  if (got_name == name && got == message) return;
  std::printf("forced %s: expected %s (%s), got %s (%s)\n", forced ? forced : "-", name, message, got_name.c_str(),
              got.c_str());
  std::exit(1);
}

int main() {
  const char* automatic =
      "best of scalar, middle, best that this CPU and operating system support; best needs feature X";
  expect(nullptr, "middle", automatic);
  expect("", "middle", automatic);
  expect("scalar", "scalar", "forced by DSFORMER_ISA=scalar");
  expect("middle", "middle", "forced by DSFORMER_ISA=middle");
  expect("best", "none",
         "DSFORMER_ISA=best is impossible here: it needs feature X, which this CPU or operating system lacks; unset it "
         "or choose another of scalar, middle, best");
  expect("nonsense", "none", "DSFORMER_ISA=nonsense is not a tier of this build; it knows scalar, middle, best");
}
