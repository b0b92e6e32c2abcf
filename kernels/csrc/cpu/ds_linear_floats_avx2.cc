// Weights of any kind as floats, with AVX2, FMA, F16C: 8 tokens a vector.
#include <immintrin.h>

#include "../ds_linear.h"

namespace dsformer {
namespace {

#include "vec_avx2.inc"

// Dense phase: 12 accumulators of the 16 registers at most; panels of two vectors.
constexpr int kPanel = 2;
constexpr int kDenseRows[] = {0, 8, 6};
// Sparse phase: two rows of more vectors than these would spill.
constexpr int kPairVectors = 6;
#define TIER_HAS_8_VECTORS

Vec from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
Vec from_int16(const uint16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
Vec from_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

#include "ds_linear_floats.inc"

}  // namespace

extern const DsLinearTier ds_linear_floats_avx2 = {
    kLanes,  kMinTileTokens, kMaxTileTokens, kStepRows, kL1Share, sizeof(float), float_tile, suits_all,
    nullptr, nullptr,        0,              nullptr,   dense,    sparse,        normalize};

}  // namespace dsformer
