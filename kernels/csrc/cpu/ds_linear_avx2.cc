// AVX2, FMA, F16C: 8 tokens a vector.
#include <immintrin.h>

#include "../ds_linear.h"

namespace dsformer {
namespace {

using Vec = __m256;
constexpr int64_t kLanes = 8;
// Dense phase: 12 accumulators of the 16 registers at most; panels of two vectors.
constexpr int kPanel = 2;
constexpr int kDenseRows[] = {0, 8, 6};
// Sparse phase: two rows of more vectors than these would spill.
constexpr int kPairVectors = 6;
#define TIER_HAS_8_VECTORS

Vec zero() { return _mm256_setzero_ps(); }
Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
Vec broadcast_value(float x) { return _mm256_set1_ps(x); }
Vec load(const float* p) { return _mm256_loadu_ps(p); }
void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
__m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
Vec load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
void store_first(float* p, int64_t n, Vec v) { _mm256_maskstore_ps(p, first_lanes(n), v); }
Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
Vec from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
Vec from_int16(const uint16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
float total(Vec v) {
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}
float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

Vec unpack_low_pairs(Vec a, Vec b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
Vec unpack_high_pairs(Vec a, Vec b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}

// 8 x 8: transposes the 4 x 4 quarters inside each 128-bit part, then the parts.
void transpose(Vec* v) {
  Vec q[8];
  for (int i = 0; i < 8; i += 4) {
    const Vec ab_low = _mm256_unpacklo_ps(v[i], v[i + 1]), ab_high = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const Vec cd_low = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), cd_high = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    q[i] = unpack_low_pairs(ab_low, cd_low);
    q[i + 1] = unpack_high_pairs(ab_low, cd_low);
    q[i + 2] = unpack_low_pairs(ab_high, cd_high);
    q[i + 3] = unpack_high_pairs(ab_high, cd_high);
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2f128_ps(q[j], q[4 + j], 0x20);
    v[4 + j] = _mm256_permute2f128_ps(q[j], q[4 + j], 0x31);
  }
}

#include "ds_linear_tiles.inc"

}  // namespace

extern const DsLinearTier ds_linear_avx2 = {kLanes, kMaxTileTokens, sizeof(float), nullptr, dense, sparse, normalize,
                                             nullptr};

}  // namespace dsformer
