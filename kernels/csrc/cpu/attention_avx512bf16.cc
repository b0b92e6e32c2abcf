// Attention with AVX-512 and bfloat16: as in attention_avx512.cc, but with queries, keys, weights and
// values rounded to 8 bits, whose products an instruction adds in pairs: two of a head's columns for the
// scores, two keys for the output. Sums, and the softmax, are float32.
//
// Keys and values are rounded again for every task: a small part of its work, and no memory that grows with them.
#include <immintrin.h>

#include "../attention.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"
#include "squares.inc"
#include "softmax.inc"

constexpr int kRows = 8;  // in flight beside kQueryVectors vectors: 16 sums

// Two floats a lane, rounded: the first of each pair from `first`, the second from `second`.
__m512i pairs(Vec first, Vec second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);  // 16 of `first`, then 16 of `second`
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

// n numbers of a row as neighbouring pairs; beyond them zeros, up to whole vectors of 16 pairs.
void round_row(const float* x, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const Vec low = load_some(x + i, n - i), high = load_some(x + i + kLanes, n - i - kLanes);
    _mm512_storeu_si512(out + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// out (R rows, kPitch) = or += pairs of a, by steps, times pairs of x_t (n, kPitch).
template <int R>
void multiply(const int32_t* a, int64_t row_step, int64_t column_step, const int32_t* x_t, int64_t n, float* out,
              bool first) {
  Vec sum[R][kQueryVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kQueryVectors; ++v) sum[r][v] = first ? zero() : load(out + r * kPitch + v * kLanes);
  }
  for (int64_t i = 0; i < n; ++i) {
    __m512bh lanes[kQueryVectors];
    for (int v = 0; v < kQueryVectors; ++v) {
      lanes[v] = (__m512bh)_mm512_loadu_si512(x_t + i * kPitch + v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(a[r * row_step + i * column_step]);
      for (int v = 0; v < kQueryVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], lanes[v], pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kQueryVectors; ++v) store(out + r * kPitch + v * kLanes, sum[r][v]);
  }
}

void multiply_rows(const int32_t* a, int64_t rows, int64_t row_step, int64_t column_step, const int32_t* x_t, int64_t n,
                   float* out, bool first) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply<kRows>(a + r * row_step, row_step, column_step, x_t, n, out + r * kPitch, first);
  }
  for (; r < rows; ++r) multiply<1>(a + r * row_step, row_step, column_step, x_t, n, out + r * kPitch, first);
}

// 2 to the x, for x up to 0, within 4e-6 of it: a minimax polynomial for the fraction, made for this file.
Vec power_of_two(Vec x) {
  constexpr int kFraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;  // x less the integer below it
  const Vec r = _mm512_reduce_ps(x, kFraction);
  Vec p = broadcast_value(0x1.bc30bep-7f);
  p = fma(p, r, broadcast_value(0x1.aa402cp-5f));
  p = fma(p, r, broadcast_value(0x1.ee587ep-3f));
  p = fma(p, r, broadcast_value(0x1.62d51ap-1f));
  p = fma(p, r, broadcast_value(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Scores (keys, kPitch) of one chunk, in powers of two -> their powers below the largest so far, as pairs of keys; the
// sums of earlier chunks, and the outputs (width, kPitch), are corrected for it. Masked keys become zero.
void powers(const float* scores, int64_t keys, const int32_t* mask, Softmax& state, float* out, int64_t width,
            int32_t* weights) {
  for (int64_t lane = 0; lane < kPitch; lane += kLanes) {
    const Vec before = load(state.largest + lane);
    Vec largest = before;
    for (int64_t k = 0; k < keys; ++k) {
      if (!mask || mask[k]) largest = max(largest, load(scores + k * kPitch + lane));
    }
    const Vec correction = power_of_two(before - largest);
    Vec sum = load(state.sum + lane) * correction;
    const auto weight = [&](int64_t k) {
      return k < keys && (!mask || mask[k]) ? power_of_two(load(scores + k * kPitch + lane) - largest) : zero();
    };
    for (int64_t k = 0; k < keys; k += 2) {
      const Vec first = weight(k), second = weight(k + 1);
      sum = sum + (first + second);
      _mm512_storeu_si512(weights + k / 2 * kPitch + lane, pairs(first, second));
    }
    store(state.largest + lane, largest);
    store(state.sum + lane, sum);
    for (int64_t i = 0; i < width; ++i) store(out + i * kPitch + lane, load(out + i * kPitch + lane) * correction);
  }
}

// Values of `keys` keys -> pairs of keys (keys / 2, width rounded up to kLanes).
void pair_values(const float* values, int64_t pitch, int64_t keys, int64_t width, int64_t row, int32_t* out) {
  for (int64_t k = 0; k < keys; k += 2, out += row) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec second = k + 1 < keys ? load_some(values + (k + 1) * pitch + i, width - i) : zero();
      _mm512_storeu_si512(out + i, pairs(load_some(values + k * pitch + i, width - i), second));
    }
  }
}

// 32 queries, scaled -> pairs of columns (width / 2, kPitch).
void pair_queries(const float* queries, int64_t pitch, int64_t tokens, int64_t width, Vec scale, int32_t* out) {
  for (int64_t t = 0; t < kPitch; t += kLanes) {
    for (int64_t i = 0; i < width; i += 2 * kLanes) {
      Vec v[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        const float* x = queries + (t + j) * pitch + i;
        const int64_t n = t + j < tokens ? width - i : 0;
        v[j] = (Vec)_mm512_cvtne2ps_pbh(load_some(x + kLanes, n - kLanes) * scale, load_some(x, n) * scale);
      }
      transpose(v);
      float* row = reinterpret_cast<float*>(out) + i / 2 * kPitch + t;
      for (int64_t j = 0; j < smaller(kLanes, (width - i + 1) / 2); ++j) store(row + j * kPitch, v[j]);
    }
  }
}

// What a task keeps of 32 queries from chunk to chunk of keys.
struct Block {
  alignas(64) int32_t q[kMostWidth / 2 * kPitch];
  alignas(64) float out[kMostWidth * kPitch];
  alignas(64) Softmax state;
};
constexpr int64_t kBlocks = 2;

void attend(const Attention& layer, int64_t text, int64_t head, int64_t first, int64_t tokens) {
  const int64_t hidden = layer.n_heads * layer.width, pitch = 3 * hidden;
  const float* queries = layer.qkv + text * layer.tokens * pitch + head * layer.width;
  const float* keys = queries + hidden;
  const float* values = keys + hidden;
  const int32_t* mask = layer.mask ? layer.mask + text * layer.tokens : nullptr;
  const int64_t key_pairs = (layer.width + 1) / 2, key_row = (key_pairs + kLanes - 1) / kLanes * kLanes;
  const int64_t value_row = (layer.width + kLanes - 1) / kLanes * kLanes;

  alignas(64) int32_t k_pairs[kKeys * kMostWidth / 2], v_pairs[kKeys / 2 * kMostWidth], weights[kKeys / 2 * kPitch];
  alignas(64) float scores[kKeys * kPitch];
  Block blocks[kBlocks];
  const int64_t n_blocks = (tokens + kPitch - 1) / kPitch;
  // Scores are powers of two: 1 / ln 2 goes into the queries.
  const Vec scale = broadcast_value(0x1.715476p+0f / root(static_cast<float>(layer.width)));
  for (int64_t i = 0; i < n_blocks; ++i) {
    Block& block = blocks[i];
    pair_queries(queries + (first + i * kPitch) * pitch, pitch, tokens - i * kPitch, layer.width, scale, block.q);
    for (int64_t j = 0; j < layer.width * kPitch; j += kLanes) store(block.out + j, zero());
    begin(block.state);
  }
  for (int64_t k = 0; k < layer.tokens; k += kKeys) {
    const int64_t n = smaller(kKeys, layer.tokens - k);
    for (int64_t i = 0; i < n; ++i) round_row(keys + (k + i) * pitch, layer.width, k_pairs + i * key_row);
    pair_values(values + k * pitch, pitch, n, layer.width, value_row, v_pairs);
    for (int64_t i = 0; i < n_blocks; ++i) {
      Block& block = blocks[i];
      multiply_rows(k_pairs, n, key_row, 1, block.q, key_pairs, scores, true);
      powers(scores, n, mask ? mask + k : nullptr, block.state, block.out, layer.width, weights);
      multiply_rows(v_pairs, layer.width, 1, value_row, weights, (n + 1) / 2, block.out, false);
    }
  }
  float* y = layer.y + (text * layer.tokens + first) * hidden + head * layer.width;
  for (int64_t i = 0; i < n_blocks; ++i) {
    write_head(blocks[i].out, blocks[i].state, layer.width, y + i * kPitch * hidden, hidden, tokens - i * kPitch);
  }
}

}  // namespace

extern const AttentionTier attention_avx512bf16 = {kBlocks * kPitch, attend, &attention_avx512};

}  // namespace dsformer
