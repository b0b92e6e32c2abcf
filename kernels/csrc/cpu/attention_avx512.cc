// Attention with AVX-512: 32 queries at a time.
#include <immintrin.h>

#include "../attention.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"

constexpr int kRows = 8;  // with two vectors, 16 of the 32 registers; divides the usual 32 and 64 columns of a head

Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Vec power(Vec n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }

#include "attention.inc"

}  // namespace

extern const AttentionTier attention_avx512 = {kPitch, attend, nullptr};

}  // namespace dsformer
