// Attention with AVX2 and FMA: 16 queries at a time.
#include <immintrin.h>

#include "../attention.h"

namespace dsformer {
namespace {

#include "vec_avx2.inc"

constexpr int kRows = 4;  // with two vectors, 8 of the 16 registers

Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Vec power(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

#include "attention.inc"

}  // namespace

extern const AttentionTier attention_avx2 = {kPitch, attend, nullptr};

}  // namespace dsformer
