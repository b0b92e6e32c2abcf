// The one place where the instruction-set tier is chosen.
#pragma once
#include "ds_linear.h"
#include "omp.h"

namespace dsformer {

struct Tier {
  const char* name;
  const char* requires_features;  // in words, for the error when it is forced and missing
  bool (*supported)();            // by this CPU and this operating system
  const DsLinearTier* ds_linear;
  const OmpTier* omp;
};

struct Choice {
  const Tier* tier;     // null when DSFORMER_ISA names an unknown or an impossible tier
  const char* message;  // why this tier, or why none, as a sentence
};

// Chosen at the first call and kept: DSFORMER_ISA if set, else the best tier that is supported.
const Choice& choice();

}  // namespace dsformer
