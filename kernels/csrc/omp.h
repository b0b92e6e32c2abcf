// Batch-OMP: what the tiers of omp_rows.cc offer to omp.cc. Plain structs only: this header is compiled under
// different instruction-set flags, and an inline function here could be merged across them by the linker.
#pragma once
#include <cstdint>

namespace dsformer {

// Rows of the Gram matrix are padded with zero atoms to whole cache lines, so that no inner loop has a tail.
constexpr int64_t kOmpPad = 16;

// One block of the weight, prepared for coding. What is padded is 64-byte aligned.
struct OmpBlock {
  int64_t n_atoms;       // K
  int64_t width;         // B
  int64_t pitch;         // K rounded up to kOmpPad
  int64_t bank_atoms;    // atoms of each bank but the last
  int64_t bank_limit;    // most codes of a row in one bank
  const float* atoms;    // (K, B): the dictionary
  const float* atoms_t;  // (B, pitch): the dictionary transposed, padding zero
  const float* gram;     // (K, pitch): D Dᵀ, padding zero
};

// Rows [0, n_rows) of one block; row r starts at x + r * x_pitch and holds `width` floats.
struct OmpRows {
  int64_t n_rows;
  int64_t x_pitch;
  const float* x;
  int64_t n_nonzero;  // S
  int32_t* indices;   // (n_rows, S): written by code, read by refit
  float* values;      // (n_rows, S): written
};

struct OmpTier {
  // Fills atoms_t and gram of a block from its atoms.
  void (*prepare)(const OmpBlock& block, float* atoms_t, float* gram);
  // Floats of 64-byte aligned scratch that code and refit need.
  int64_t (*scratch_floats)(const OmpBlock& block, int64_t n_nonzero);
  // Both return the number of the first row that is not finite, or -1 when all went well.
  int64_t (*code)(const OmpBlock& block, const OmpRows& rows, float* scratch);
  int64_t (*refit)(const OmpBlock& block, const OmpRows& rows, float* scratch);
};

extern const OmpTier omp_scalar;
#if defined(__x86_64__)
extern const OmpTier omp_avx2;
extern const OmpTier omp_avx512;
#endif

}  // namespace dsformer
