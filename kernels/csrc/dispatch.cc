#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace dsformer {
namespace {

// __builtin_cpu_supports looks at CPUID and, for AVX and later, at the state the operating system saves (XCR0).
const Tier kTiers[] = {  // best first
#if defined(__x86_64__)
    {"avx512", "AVX-512 F, BW, VL, DQ",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     &ds_linear_avx512, &omp_avx512},
    {"avx2", "AVX2, FMA, F16C",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     &ds_linear_avx2, &omp_avx2},
#endif
    {"scalar", "nothing", [] { return true; }, &ds_linear_scalar, &omp_scalar},
};

std::string names() {
  std::string text;
  for (const Tier& tier : kTiers) text = tier.name + (text.empty() ? "" : ", " + text);
  return text;
}

struct Chosen : Choice {
  std::string text;

  Chosen() {
    tier = nullptr;
    const char* forced = std::getenv("DSFORMER_ISA");
    if (forced && *forced) {
      force(forced);
    } else {
      pick();
    }
    message = text.c_str();
  }

  void force(const char* name) {
    for (const Tier& candidate : kTiers) {
      if (std::strcmp(candidate.name, name) != 0) continue;
      if (candidate.supported()) {
        tier = &candidate;
        text = std::string("forced by DSFORMER_ISA=") + name;
      } else {
        text = std::string("DSFORMER_ISA=") + name + " is impossible here: it needs " + candidate.requires_features +
               ", which this CPU or operating system lacks; unset it or choose a lower tier of " + names();
      }
      return;
    }
    text = std::string("DSFORMER_ISA=") + name + " is not a tier of this build; it knows " + names();
  }

  void pick() {
    for (const Tier& candidate : kTiers) {
      if (!candidate.supported()) {
        text += std::string(text.empty() ? "" : "; ") + candidate.name + " needs " + candidate.requires_features +
                ", missing here";
        continue;
      }
      tier = &candidate;
      text = std::string("best of ") + names() + " that this CPU and operating system support" +
             (text.empty() ? "" : " (" + text + ")");
      return;
    }
  }
};

}  // namespace

const Choice& choice() {
  static const Chosen chosen;
  return chosen;
}

}  // namespace dsformer

// Name of the chosen tier (null: none) and the reason, both alive as long as the process.
extern "C" __attribute__((visibility("default"))) void dsformer_isa(const char** name, const char** reason) {
  const dsformer::Choice& choice = dsformer::choice();
  *name = choice.tier ? choice.tier->name : nullptr;
  *reason = choice.message;
}
