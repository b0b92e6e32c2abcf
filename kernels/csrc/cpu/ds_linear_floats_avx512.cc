// Weights of any kind as floats, with AVX-512 F, BW, VL, DQ: 16 tokens a vector, masks for tails.
#include <immintrin.h>

#include "../ds_linear.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"

// Dense phase: 24 accumulators of the 32 registers at most; a panel is all four vectors of the largest tile.
constexpr int kPanel = 4;
constexpr int kDenseRows[] = {0, 12, 12, 8, 6};
constexpr int kPairVectors = 4;

Vec from_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
Vec from_int16(const uint16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
Vec from_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#include "ds_linear_floats.inc"

}  // namespace

extern const DsLinearTier ds_linear_floats_avx512 = {
    kLanes,  kMinTileTokens, kMaxTileTokens, kStepRows, kL1Share, sizeof(float), float_tile, suits_all,
    nullptr, nullptr,        0,              nullptr,   dense,    sparse,        normalize};

}  // namespace dsformer
