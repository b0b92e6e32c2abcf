// The one place where the instruction-set tier is chosen.
#pragma once
#include <cstddef>
#include <string>

#include "attention.h"
#include "ds_linear.h"
#include "omp.h"

namespace dsformer {

struct Tier {
  const char* name;
  const char* requires_features;  // in words, for the error when it is forced and missing
  bool (*supported)();            // by this CPU and this operating system
  const DsLinearTier* ds_linear;
  const AttentionTier* attention;
  const OmpTier* omp;
};

struct Choice {
  const Tier* tier;     // null when DSFORMER_ISA names an unknown or an impossible tier
  const char* message;  // why this tier, or why none, as a sentence
};

// The tier to use of `tiers`, best first: the one named `forced`, if that is neither null nor empty, else the first
// that is supported. Null when that is impossible. `message` says why, in either case.
const Tier* choose(const char* forced, const Tier* tiers, size_t n_tiers, std::string* message);

// Chosen at the first call and kept: DSFORMER_ISA if set, else the best tier that is supported.
const Choice& choice();

}  // namespace dsformer
