#include "dispatch.h"

#include <cstdlib>
#include <string>

namespace dsformer {
namespace {

// __builtin_cpu_supports looks at CPUID and, for AVX and later, at the state the operating system saves (XCR0).
#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512vbmi() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

const Tier kTiers[] = {  // best first
#if defined(__x86_64__)
    {"avx512bf16", "AVX-512 F, BW, VL, DQ, VNNI, VBMI, BF16",
     [] { return has_avx512vbmi() && __builtin_cpu_supports("avx512bf16"); }, &ds_linear_avx512vbmi,
     &attention_avx512bf16, &omp_avx512},
    {"avx512vbmi", "AVX-512 F, BW, VL, DQ, VNNI, VBMI",
     has_avx512vbmi, &ds_linear_avx512vbmi, &attention_avx512, &omp_avx512},
    {"avx512vnni", "AVX-512 F, BW, VL, DQ, VNNI",
     [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }, &ds_linear_avx512vnni, &attention_avx512,
     &omp_avx512},
    {"avx512", "AVX-512 F, BW, VL, DQ",
     has_avx512, &ds_linear_avx512, &attention_avx512, &omp_avx512},
    {"avx2", "AVX2, FMA, F16C",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     &ds_linear_avx2, &attention_avx2, &omp_avx2},
#endif
    {"scalar", "nothing", [] { return true; }, &ds_linear_scalar, &attention_scalar, &omp_scalar},
};

std::string names(const Tier* tiers, size_t n_tiers) {
  std::string text;
  for (size_t i = n_tiers; i-- > 0;) text += (text.empty() ? "" : ", ") + std::string(tiers[i].name);
  return text;
}

const Tier* force(const std::string& name, const Tier* tiers, size_t n_tiers, std::string* message) {
  const std::string setting = "DSFORMER_ISA=" + name;
  for (size_t i = 0; i < n_tiers; ++i) {
    if (name != tiers[i].name) continue;
    if (tiers[i].supported()) {
      *message = "forced by " + setting;
      return &tiers[i];
    }
    *message = setting + " is impossible here: it needs " + tiers[i].requires_features +
               ", which this CPU or operating system lacks; unset it or choose another of " + names(tiers, n_tiers);
    return nullptr;
  }
  *message = setting + " is not a tier of this build; it knows " + names(tiers, n_tiers);
  return nullptr;
}

}  // namespace

const Tier* choose(const char* forced, const Tier* tiers, size_t n_tiers, std::string* message) {
  if (forced && *forced) return force(forced, tiers, n_tiers, message);
  std::string missing;
  for (size_t i = 0; i < n_tiers; ++i) {
    if (tiers[i].supported()) {
      *message = "best of " + names(tiers, n_tiers) + " that this CPU and operating system support" + missing;
      return &tiers[i];
    }
    missing += std::string("; ") + tiers[i].name + " needs " + tiers[i].requires_features;
  }
  *message = "this build has no tier for this CPU";
  return nullptr;
}

const Choice& choice() {
  static std::string message;
  static const Tier* const tier =
      choose(std::getenv("DSFORMER_ISA"), kTiers, sizeof kTiers / sizeof *kTiers, &message);
  static const Choice chosen{tier, message.c_str()};
  return chosen;
}

}  // namespace dsformer

// Name of the chosen tier (null: none) and the reason, both alive as long as the process.
extern "C" __attribute__((visibility("default"))) void dsformer_isa(const char** name, const char** reason) {
  const dsformer::Choice& choice = dsformer::choice();
  *name = choice.tier ? choice.tier->name : nullptr;
  *reason = choice.message;
}
