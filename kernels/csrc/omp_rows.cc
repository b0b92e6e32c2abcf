// Batch-OMP of the rows of one block.
//
// R. Rubinstein, M. Zibulevsky, M. Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal
// Matching Pursuit", Technion CS-2008-08: with the Gram matrix G = D Dᵀ at hand, the correlations of all atoms with
// the residual of a row x are  alpha = D x - G_I gamma,  so the residual itself is never formed; and gamma, the
// least-squares values on the support I, comes from a Cholesky factor of G_II that grows by one row a step.
//
// Coding has atoms for its lanes. A row's working set (alpha0, alpha: 2 K floats, and an S x S factor) stays in L1; the
// Gram rows come from L2. Refitting knows the support, so it wants S correlations and no others, and what is left is one
// Cholesky solution a row: there lanes are rows.
// This file is compiled once per tier and leaves the vectorising to the compiler: maxima are taken on integer bit
// patterns, because a float maximum would need -ffast-math. It calls nothing inline from the standard library (see
// omp.h).
#include "omp.h"

#include <limits.h>
#include <string.h>

namespace dsformer {
namespace {

// A pivot is 1 minus the part of a unit atom that earlier atoms explain. Below this it is rounding error of the
// float32 Gram matrix: the atom is collinear with the support.
constexpr double kMinPivot = 1e-6;
// Correlations below this fraction of the row's largest entry are rounding error of D x - G gamma in float32.
constexpr float kStopCorrelation = 1e-6f;
constexpr int32_t kInfinityBits = 0x7f800000;

int32_t magnitude_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;  // non-negative floats order like their bit patterns
}

float from_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int32_t max_magnitude_bits(const float* x, int64_t n) {
  int32_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = magnitude_bits(x[i]);
    best = bits > best ? bits : best;
  }
  return best;
}

// In arithmetic: with a condition in it GCC makes this loop scalar, and then it takes most of a coding's time.
int32_t first_with_magnitude(const float* x, int32_t n, int32_t wanted) {
  uint32_t first = UINT_MAX;
  for (int32_t i = 0; i < n; ++i) {
    const uint32_t other = magnitude_bits(x[i]) != wanted;
    const uint32_t candidate = static_cast<uint32_t>(i) | (0u - other);
    first = candidate < first ? candidate : first;
  }
  return static_cast<int32_t>(first);
}

// out = base + sum_j coefficients[j] * rows[j]; four rows a pass, so that `out` is stored once for four FMAs.
void add_rows(float* __restrict out, const float* base, int64_t pitch, const float* rows, const int32_t* row_numbers,
              const float* coefficients, int64_t count) {
  for (int64_t j = 0; j < count; j += 4) {
    float c[4] = {0, 0, 0, 0};
    const float* __restrict r[4] = {rows, rows, rows, rows};
    for (int64_t t = 0; t < 4 && j + t < count; ++t) {
      c[t] = coefficients[j + t];
      r[t] = rows + (row_numbers ? row_numbers[j + t] : j + t) * pitch;
    }
    const float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
    const float *__restrict r0 = r[0], *__restrict r1 = r[1], *__restrict r2 = r[2], *__restrict r3 = r[3];
    if (j == 0) {
      const float* __restrict b = base;
      for (int64_t k = 0; k < pitch; ++k) out[k] = b[k] + c0 * r0[k] + c1 * r1[k] + c2 * r2[k] + c3 * r3[k];
    } else {
      for (int64_t k = 0; k < pitch; ++k) out[k] += c0 * r0[k] + c1 * r1[k] + c2 * r2[k] + c3 * r3[k];
    }
  }
}

// The scratch of one row, carved from one buffer.
struct Scratch {
  float* zeros;      // (pitch): the empty sum
  float* alpha0;     // (pitch): D x
  float* alpha;      // (pitch): correlations with the residual
  float* minus_gamma;  // (S): the values, negated and rounded
  double* factor;    // (S, S): lower Cholesky factor, reciprocal pivots on its diagonal (0: dependent atom)
  double* z;         // (S): solution of  factor z = alpha0_I
  double* gamma;     // (S)
  int32_t* in_bank;  // (banks): codes of the row so far
};

int64_t banks_of(const OmpBlock& block) { return (block.n_atoms + block.bank_atoms - 1) / block.bank_atoms; }

Scratch carve(float* memory, int64_t pitch, int64_t n) {
  Scratch s;
  s.factor = reinterpret_cast<double*>(memory);
  s.z = s.factor + n * n;
  s.gamma = s.z + n;
  float* floats = memory + 2 * (n * n + 2 * n);
  floats += (kOmpPad - (floats - memory) % kOmpPad) % kOmpPad;
  s.zeros = floats;
  s.alpha0 = s.zeros + pitch;
  s.alpha = s.alpha0 + pitch;
  s.minus_gamma = s.alpha + pitch;
  s.in_bank = reinterpret_cast<int32_t*>(s.minus_gamma + n);
  memset(s.zeros, 0, pitch * sizeof(float));
  return s;
}

// Rows that are refitted together.
constexpr int64_t kLanes = 8;

// The scratch of kLanes rows that are refitted together.
struct LaneScratch {
  double (*factor)[kLanes];      // (S, S): lower Cholesky factor
  double (*reciprocal)[kLanes];  // (S): of its diagonal (0: dependent atom)
  double (*z)[kLanes];           // (S): first D_I x, then the solution of  factor z = D_I x
  double (*gamma)[kLanes];       // (S)
};

LaneScratch carve_lanes(float* memory, int64_t n) {
  LaneScratch s;
  s.factor = reinterpret_cast<double(*)[kLanes]>(memory);
  s.reciprocal = s.factor + n * n;
  s.z = s.reciprocal + n;
  s.gamma = s.z + n;
  return s;
}

int64_t scratch_floats(const OmpBlock& block, int64_t n) {
  const int64_t coding = 2 * (n * n + 2 * n) + kOmpPad + 3 * block.pitch + n + banks_of(block);
  const int64_t refitting = 2 * kLanes * (n * n + 3 * n);
  return coding > refitting ? coding : refitting;
}

// Appends atom `support[n]` to the Cholesky factor and its entry to z. Returns false when the atom depends on the
// first n; its row then solves to 0, so the factor stays usable.
bool append_atom(const OmpBlock& block, const Scratch& s, const int32_t* support, int64_t n, int64_t capacity) {
  const float* gram_row = block.gram + support[n] * block.pitch;
  double* row = s.factor + n * capacity;
  double pivot = gram_row[support[n]];
  double z = s.alpha0[support[n]];
  for (int64_t i = 0; i < n; ++i) {
    const double* earlier = s.factor + i * capacity;
    double w = gram_row[support[i]];
    for (int64_t j = 0; j < i; ++j) w -= earlier[j] * row[j];
    w *= earlier[i];
    row[i] = w;
    pivot -= w * w;
    z -= w * s.z[i];
  }
  const bool independent = pivot > kMinPivot;
  row[n] = independent ? 1.0 / __builtin_sqrt(pivot) : 0.0;
  s.z[n] = z * row[n];
  return independent;
}

// gamma from  factorᵀ gamma = z.
void solve(const Scratch& s, int64_t n, int64_t capacity) {
  for (int64_t i = n; i-- > 0;) {
    double g = s.z[i];
    for (int64_t j = i + 1; j < n; ++j) g -= s.factor[j * capacity + i] * s.gamma[j];
    s.gamma[i] = g * s.factor[i * capacity + i];
  }
}

// Zero for every atom that may not be chosen any more: those of the support, and of banks that have their share.
void exclude(const OmpBlock& block, const Scratch& s, const int32_t* support, int64_t n) {
  for (int64_t i = 0; i < n; ++i) s.alpha[support[i]] = 0.0f;
  if (block.bank_limit >= n + 1) return;
  for (int64_t bank = 0; bank < banks_of(block); ++bank) {
    if (s.in_bank[bank] < block.bank_limit) continue;
    const int64_t first = bank * block.bank_atoms, rest = block.n_atoms - first;
    memset(s.alpha + first, 0, (rest < block.bank_atoms ? rest : block.bank_atoms) * sizeof(float));
  }
}

bool contains(const int32_t* support, int64_t n, int32_t atom) {
  for (int64_t i = 0; i < n; ++i) {
    if (support[i] == atom) return true;
  }
  return false;
}

// Completes a support of n atoms with the lowest atoms not in it; their values are 0.
void fill_support(int32_t* support, int64_t n, int64_t capacity) {
  for (int32_t atom = 0; n < capacity; ++atom) {
    if (!contains(support, n, atom)) support[n++] = atom;
  }
}

// Returns false when x, or its product with the dictionary, is not finite.
bool code_row(const OmpBlock& block, const float* x, int64_t capacity, int32_t* support, float* values,
              const Scratch& s) {
  const int32_t x_bits = max_magnitude_bits(x, block.width);
  if (x_bits >= kInfinityBits) return false;
  const int32_t stop_bits = magnitude_bits(kStopCorrelation * from_bits(x_bits));
  add_rows(s.alpha0, s.zeros, block.pitch, block.atoms_t, nullptr, x, block.width);

  int64_t n = 0;
  memset(s.in_bank, 0, banks_of(block) * sizeof(int32_t));
  const float* correlations = s.alpha0;
  while (n < capacity) {
    const int32_t best = max_magnitude_bits(correlations, block.pitch);
    if (best >= kInfinityBits) return false;
    if (best <= stop_bits) break;
    support[n] = first_with_magnitude(correlations, static_cast<int32_t>(block.pitch), best);
    if (!append_atom(block, s, support, n, capacity)) break;
    ++s.in_bank[support[n] / block.bank_atoms];
    ++n;
    solve(s, n, capacity);
    if (n == capacity) break;
    for (int64_t i = 0; i < n; ++i) s.minus_gamma[i] = static_cast<float>(-s.gamma[i]);
    add_rows(s.alpha, s.alpha0, block.pitch, block.gram, support, s.minus_gamma, n);
    exclude(block, s, support, n);
    correlations = s.alpha;
  }
  for (int64_t i = 0; i < capacity; ++i) values[i] = i < n ? static_cast<float>(s.gamma[i]) : 0.0f;
  fill_support(support, n, capacity);
  return true;
}

float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sums[kOmpPad] = {};  // enough chains for the widest registers
  int64_t i = 0;
  for (; i + kOmpPad <= n; i += kOmpPad) {
    for (int64_t t = 0; t < kOmpPad; ++t) sums[t] += a[i + t] * b[i + t];
  }
  for (int64_t t = 0; i + t < n; ++t) sums[t] += a[i + t] * b[i + t];
  for (int64_t half = kOmpPad / 2; half > 0; half /= 2) {
    for (int64_t t = 0; t < half; ++t) sums[t] += sums[t + half];
  }
  return sums[0];
}

// What refitting one row in a lane starts from: the Gram matrix of its support, and the support's correlations with x.
void fill_lane(const OmpBlock& block, const float* x, int64_t n, const int32_t* support, int64_t lane,
               const LaneScratch& s) {
  for (int64_t i = 0; i < n; ++i) {
    const float* gram_row = block.gram + support[i] * block.pitch;
    for (int64_t j = 0; j <= i; ++j) s.factor[i * n + j][lane] = gram_row[support[j]];
    s.z[i][lane] = dot(block.atoms + support[i] * block.width, x, block.width);
  }
}

// gamma from  G gamma = z  in every lane, by Cholesky as in append_atom and solve. Loops over lanes read and write
// locals alone, for the compiler cannot know that the arrays behind the pointers do not overlap.
void solve_lanes(const LaneScratch& s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    double (*row)[kLanes] = s.factor + i * n;
    double pivot[kLanes], z[kLanes];
    memcpy(pivot, row[i], sizeof pivot);
    memcpy(z, s.z[i], sizeof z);
    for (int64_t j = 0; j < i; ++j) {
      const double (*earlier)[kLanes] = s.factor + j * n;
      double w[kLanes];
      memcpy(w, row[j], sizeof w);
      for (int64_t t = 0; t < j; ++t) {
        for (int64_t l = 0; l < kLanes; ++l) w[l] -= earlier[t][l] * row[t][l];
      }
      for (int64_t l = 0; l < kLanes; ++l) {
        w[l] *= s.reciprocal[j][l];
        pivot[l] -= w[l] * w[l];
        z[l] -= w[l] * s.z[j][l];
      }
      memcpy(row[j], w, sizeof w);
    }
    double reciprocal[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      const bool independent = pivot[l] > kMinPivot;
      const double inverse = 1.0 / __builtin_sqrt(independent ? pivot[l] : 1.0);
      reciprocal[l] = independent ? inverse : 0.0;
      z[l] *= reciprocal[l];
    }
    memcpy(s.reciprocal[i], reciprocal, sizeof reciprocal);
    memcpy(s.z[i], z, sizeof z);
  }
  for (int64_t i = n; i-- > 0;) {
    double g[kLanes];
    memcpy(g, s.z[i], sizeof g);
    for (int64_t j = i + 1; j < n; ++j) {
      for (int64_t l = 0; l < kLanes; ++l) g[l] -= s.factor[j * n + i][l] * s.gamma[j][l];
    }
    for (int64_t l = 0; l < kLanes; ++l) g[l] *= s.reciprocal[i][l];
    memcpy(s.gamma[i], g, sizeof g);
  }
}

int64_t code(const OmpBlock& block, const OmpRows& rows, float* memory) {
  const int64_t n = rows.n_nonzero;
  const Scratch s = carve(memory, block.pitch, n);
  for (int64_t r = 0; r < rows.n_rows; ++r) {
    if (!code_row(block, rows.x + r * rows.x_pitch, n, rows.indices + r * n, rows.values + r * n, s)) return r;
  }
  return -1;
}

int64_t refit(const OmpBlock& block, const OmpRows& rows, float* memory) {
  const int64_t n = rows.n_nonzero;
  const LaneScratch s = carve_lanes(memory, n);
  for (int64_t first = 0; first < rows.n_rows; first += kLanes) {
    const int64_t left = rows.n_rows - first, count = left < kLanes ? left : kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t r = first + (lane < count ? lane : count - 1);  // lanes to spare do the last row once more
      fill_lane(block, rows.x + r * rows.x_pitch, n, rows.indices + r * n, lane, s);
    }
    solve_lanes(s, n);
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t r = first + lane;
      float* values = rows.values + r * n;
      for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(s.gamma[i][lane]);
      if (max_magnitude_bits(rows.x + r * rows.x_pitch, block.width) >= kInfinityBits) return r;
      if (max_magnitude_bits(values, n) >= kInfinityBits) return r;
    }
  }
  return -1;
}

void prepare(const OmpBlock& block, float* atoms_t, float* gram) {
  memset(atoms_t, 0, block.width * block.pitch * sizeof(float));
  for (int64_t k = 0; k < block.n_atoms; ++k) {
    for (int64_t b = 0; b < block.width; ++b) atoms_t[b * block.pitch + k] = block.atoms[k * block.width + b];
  }
  memset(gram, 0, block.n_atoms * block.pitch * sizeof(float));
  for (int64_t k = 0; k < block.n_atoms; ++k) {
    float* row = gram + k * block.pitch;
    for (int64_t b = 0; b < block.width; ++b) {
      const float d = block.atoms[k * block.width + b];
      const float* __restrict column = atoms_t + b * block.pitch;
      for (int64_t j = 0; j < block.pitch; ++j) row[j] += d * column[j];
    }
  }
}

}  // namespace

extern const OmpTier OMP_TIER = {prepare, scratch_floats, code, refit};

}  // namespace dsformer
