// AVX-512 F, BW, VL, DQ: 16 tokens a vector, masks for tails.
#include <immintrin.h>

#include "../ds_linear.h"

namespace dsformer {
namespace {

using Vec = __m512;
constexpr int64_t kLanes = 16;
// Dense phase: 24 accumulators of the 32 registers at most; a panel is all four vectors of the largest tile.
constexpr int kPanel = 4;
constexpr int kDenseRows[] = {0, 12, 12, 8, 6};
constexpr int kPairVectors = 4;

Vec zero() { return _mm512_setzero_ps(); }
Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
Vec broadcast_value(float x) { return _mm512_set1_ps(x); }
Vec load(const float* p) { return _mm512_loadu_ps(p); }
void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
void store_first(float* p, int64_t n, Vec v) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
Vec from_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

Vec unpack_low_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
Vec unpack_high_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// 16 x 16: transposes the 4 x 4 quarters inside each 128-bit part, then the parts.
void transpose(Vec* v) {
  Vec q[16];
  for (int i = 0; i < 16; i += 4) {
    const Vec ab_low = _mm512_unpacklo_ps(v[i], v[i + 1]), ab_high = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const Vec cd_low = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), cd_high = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    q[i] = unpack_low_pairs(ab_low, cd_low);
    q[i + 1] = unpack_high_pairs(ab_low, cd_low);
    q[i + 2] = unpack_low_pairs(ab_high, cd_high);
    q[i + 3] = unpack_high_pairs(ab_high, cd_high);
  }
  for (int j = 0; j < 4; ++j) {
    const Vec even_top = _mm512_shuffle_f32x4(q[j], q[4 + j], 0x88), odd_top = _mm512_shuffle_f32x4(q[j], q[4 + j], 0xdd);
    const Vec even_bottom = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0x88);
    const Vec odd_bottom = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0xdd);
    v[j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
    v[8 + j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
    v[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
    v[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
  }
}

#include "ds_linear_tiles.inc"

}  // namespace

extern const DsLinearTier ds_linear_avx512 = {kLanes, dense, sparse};

}  // namespace dsformer
