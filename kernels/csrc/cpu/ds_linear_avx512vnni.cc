// AVX-512 VNNI: integer weights times tokens in 16-bit integers, with 32-bit sums: twice the multiply-adds of float32 an
// instruction, half the bytes a product, and weights that are used as they are stored (int8 is widened a pair at a
// time). FORMAT.md section 4 has the scales, and why no sum can overflow.
//
// A multiply-add takes pairs: the two halves of each 32-bit lane of one operand times those of the other, added. In the
// dense half a pair is two neighbouring columns of the block. In the sparse half it is two nonzeros of a row, whose
// rows of products are interleaved in registers; products lie in memory in the order that makes this interleaving give
// tokens 0 to 15 and 16 to 31.
#include <immintrin.h>

#include <cstring>

#include "../ds_linear.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"
#include "squares.inc"
#include "gelu.inc"
#include "normalize.inc"

constexpr int64_t kGroup = 32;  // tokens: a vector of 16-bit products
// Norm of a token's longest block, as an integer: below 32767 by what rounding can add.
constexpr float kNorm = 32600.0f;
// Tokens of smaller norm than this are zero: kNorm over it leaves float32's range.
constexpr float kTiny = 1e-33f;
// Squares within these have neither overflowed nor lost what matters.
constexpr float kLeastSquare = 1e-24f, kLargestSquare = 1e37f;

int64_t pairs_of(int64_t width) { return (width + 1) / 2; }

// Two neighbouring numbers in every lane, and one with a zero beside it.
__m512i broadcast_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
__m512i broadcast_pair(const int8_t* p) {
  int16_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_cvtepi8_epi16(_mm256_set1_epi16(pair));
}
template <typename Number>
__m512i broadcast_one(const Number* p) { return _mm512_set1_epi32(static_cast<uint16_t>(int16_t{*p})); }

// ---- tokens as integers ----

float largest_number(const float* x, int64_t n) {
  Vec largest = zero();
  for (int64_t b = 0; b < n; b += kLanes) {
    largest = max(largest, _mm512_abs_ps(load_first(x + b, smaller(kLanes, n - b))));
  }
  return _mm512_reduce_max_ps(largest);
}

// The sums of squares of a block of each of 16 tokens.
Vec squares(const float* const* tokens, int64_t column, int64_t width) {
  Vec v[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const float* block = tokens[i] + column;
    v[i] = zero();
    int64_t b = 0;
    for (; b + kLanes <= width; b += kLanes) v[i] = fma(load(block + b), load(block + b), v[i]);
    if (b < width) {
      const Vec last = load_first(block + b, width - b);
      v[i] = fma(last, last, v[i]);
    }
  }
  transpose(v);
  for (int64_t step = kLanes / 2; step > 0; step /= 2) {
    for (int64_t i = 0; i < step; ++i) v[i] = v[i] + v[i + step];
  }
  return v[0];
}

// norms: of each of 16 tokens the largest norm of its blocks, or for tokens whose squares leave float32's range a
// bound of it; infinite or NaN if the token is.
void longest_blocks(const DsLinear& layer, const float* const* tokens, float* norms) {
  Vec largest = zero(), total = zero();
  for (int64_t block = 0; block < layer.n_blocks; ++block) {
    const Vec square = squares(tokens, block * layer.width, layer.width);
    largest = max(square, largest);
    total = total + square;
  }
  float largest_of[kLanes], total_of[kLanes];
  store(largest_of, largest);
  store(total_of, total);
  for (int64_t i = 0; i < kLanes; ++i) {
    if (__builtin_isnan(total_of[i])) {
      norms[i] = total_of[i];
    } else if (largest_of[i] > kLeastSquare && total_of[i] < kLargestSquare) {
      norms[i] = root(largest_of[i]);
    } else {
      norms[i] = largest_number(tokens[i], layer.in_features) * root(static_cast<float>(layer.width));
    }
  }
}

// 32 numbers as 16-bit integers.
Vec integers(Vec low, Vec high, Vec scale) {
  // Packing works in 128-bit parts; the permutation puts theirs in order.
  const __m512i packed = _mm512_packs_epi32(_mm512_cvtps_epi32(low * scale), _mm512_cvtps_epi32(high * scale));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed));
}

// The same of the first n of them; the others are zero.
Vec first_integers(const float* x, int64_t n, Vec scale) {
  const Vec low = load_first(x, smaller(kLanes, n));
  return integers(low, n > kLanes ? load_first(x + kLanes, n - kLanes) : zero(), scale);
}

// What `prepare` leaves: column pairs (N/B · pairs, pitch), then each token's factor (pitch): a sum of its products
// times the row's scale times this is a number of the output.
int32_t* pairs_at(const DsLinear&, const Tile& tile) { return static_cast<int32_t*>(tile.prepared); }
float* factors_at(const DsLinear& layer, const Tile& tile) {
  return static_cast<float*>(tile.prepared) + layer.n_blocks * pairs_of(layer.width) * tile.pitch;
}

// The norm of a token's longest block: kNorm, unless so many of the largest int8 codes could overflow a sum.
float norm_of(const DsLinear& layer) {
  float norm = kNorm;
  if (layer.number == Number::int8) {
    for (int64_t sum = 127 * 32767 * layer.n_blocks * layer.n_nonzero; sum >= int64_t{1} << 31; sum /= 2) norm *= 0.5f;
  }
  return norm;
}

void prepare(const DsLinear& layer, const Tile& tile, int64_t first) {
  const float norm = norm_of(layer), unit = static_cast<float>(1 << layer.atom_bits) / norm;
  const int64_t pairs = pairs_of(layer.width);
  int32_t* out = pairs_at(layer, tile) + first;
  float* factors = factors_at(layer, tile) + first;
  const float* tokens[kLanes];  // lanes beyond the last token repeat it: nothing of theirs is stored
  for (int64_t i = 0; i < kLanes; ++i) tokens[i] = tile.x + smaller(first + i, tile.tokens - 1) * layer.in_features;
  float norms[kLanes];
  longest_blocks(layer, tokens, norms);
  Vec scales[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const bool usable = norms[i] > kTiny && norms[i] < __builtin_inff();
    scales[i] = broadcast_value(usable ? norm / norms[i] : 0.0f);
    factors[i] = usable              ? norms[i] * unit
                 : norms[i] <= kTiny ? 0.0f
                                     : __builtin_nanf("");
  }
  for (int64_t block = 0; block < layer.n_blocks; ++block) {
    for (int64_t pair = 0; pair < pairs; pair += kLanes) {
      const int64_t column = block * layer.width + 2 * pair, n = layer.width - 2 * pair;
      Vec v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* x = tokens[i] + column;
        v[i] = n >= 2 * kLanes ? integers(load(x), load(x + kLanes), scales[i]) : first_integers(x, n, scales[i]);
      }
      transpose(v);
      for (int64_t j = 0; j < smaller(kLanes, pairs - pair); ++j) {
        store(reinterpret_cast<float*>(out + (block * pairs + pair + j) * tile.pitch), v[j]);
      }
    }
  }
}

// ---- dense phase ----

// R atoms times V vectors of 16 tokens -> R rows of 16-bit products. GCC 12 keeps the sums in registers only
// if every loop over them is unrolled early, which it has to be told here and in `accumulate`.
template <int R, int V, typename Number>
void multiply(const Number* atoms, int64_t width, int atom_bits, const int32_t* x, int64_t pitch, int16_t* products) {
  __m512i sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_si512();
  }
  int64_t b = 0;
  for (; b + 2 <= width; b += 2, x += pitch) {
    __m512i lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load_int(x + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512i atom = broadcast_pair(atoms + r * width + b);
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpwssd_epi32(sum[r][v], lanes[v], atom);
    }
  }
  if (b < width) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i atom = broadcast_one(atoms + r * width + b);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpwssd_epi32(sum[r][v], load_int(x + v * kLanes), atom);
    }
  }
  const __m512i half = _mm512_set1_epi32(1 << (atom_bits - 1));
  const __m128i bits = _mm_cvtsi32_si128(atom_bits);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) {
      const __m512i low = _mm512_sra_epi32(_mm512_add_epi32(sum[r][v], half), bits);
      const __m512i high = _mm512_sra_epi32(_mm512_add_epi32(sum[r][v + 1], half), bits);
      // Packing works in 128-bit parts: four tokens of `low`, four of `high`, and so on. Interleaving undoes it.
      _mm512_storeu_si512(products + r * pitch + v * kLanes, _mm512_packs_epi32(low, high));
    }
  }
}

// R atoms times all tokens of a tile, four or two vectors at a time.
template <int R, typename Number>
void multiply_atoms(const Number* atoms, int64_t width, int atom_bits, const int32_t* x, int64_t pitch,
                    int16_t* products) {
  int64_t t = 0;
  for (; t + 4 * kLanes <= pitch; t += 4 * kLanes) multiply<R, 4>(atoms, width, atom_bits, x + t, pitch, products + t);
  if (t < pitch) multiply<R, 2>(atoms, width, atom_bits, x + t, pitch, products + t);
}

template <typename Number>
void multiply_block(const DsLinear& layer, const Tile& tile, int64_t block) {
  constexpr int R = 6;  // with four vectors, 24 sums of the 32 registers
  const int64_t width = layer.width, pitch = tile.pitch;
  const int32_t* x = pairs_at(layer, tile) + block * pairs_of(width) * pitch;
  const Number* atoms = static_cast<const Number*>(layer.dictionary) + block * layer.n_atoms * width;
  int16_t* products = static_cast<int16_t*>(tile.products) + block * layer.n_atoms * pitch;
  int64_t k = 0;
  for (; k + R <= layer.n_atoms; k += R) {
    multiply_atoms<R>(atoms + k * width, width, layer.atom_bits, x, pitch, products + k * pitch);
  }
  for (; k < layer.n_atoms; ++k) {
    multiply_atoms<1>(atoms + k * width, width, layer.atom_bits, x, pitch, products + k * pitch);
  }
}

void dense(const DsLinear& layer, const Tile& tile, int64_t block) {
  (layer.number == Number::int8 ? multiply_block<int8_t> : multiply_block<int16_t>)(layer, tile, block);
}

// ---- sparse phase ----

// Codes of some rows: those of the next block lie M · S further on.
template <typename Index, typename Value>
struct Codes {
  const Index* indices;
  const Value* values;

  Codes at(int64_t code) const { return {indices + code, values + code}; }
};

// sum (R rows of G groups of 32 tokens at `out`) = or += pairs of values times pairs of rows of products, over
// `n_blocks` blocks. Inlined, because a call costs a tenth of what a row of six codes does.
template <int R, int G, typename Index, typename Value>
[[gnu::always_inline]] inline void accumulate(const DsLinear& layer, Codes<Index, Value> codes, int64_t n_blocks,
                                              const char* products, int32_t* out, bool first) {
  constexpr int64_t pitch = G * kGroup, row_bytes = pitch * sizeof(int16_t);
  const int64_t count = layer.n_nonzero;
  __m512i sum[R][2 * G];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 2 * G; ++v) sum[r][v] = first ? _mm512_setzero_si512() : load_int(out + r * pitch + v * kLanes);
  }
  for (int64_t block = 0; block < n_blocks; ++block) {
    int64_t s = 0;
    for (; s + 2 <= count; s += 2) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const char* a = products + codes.indices[r * count + s] * row_bytes;
        const char* b = products + codes.indices[r * count + s + 1] * row_bytes;
        const __m512i pair = broadcast_pair(codes.values + r * count + s);
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
          const __m512i rows_a = load_int(a + g * 64);
          __m512i rows_b = load_int(b + g * 64);
          if (G > 1) asm("" : "+v"(rows_b));  // or GCC 12 loads it twice, once for each half
          sum[r][2 * g] = _mm512_dpwssd_epi32(sum[r][2 * g], _mm512_unpacklo_epi16(rows_a, rows_b), pair);
          sum[r][2 * g + 1] = _mm512_dpwssd_epi32(sum[r][2 * g + 1], _mm512_unpackhi_epi16(rows_a, rows_b), pair);
        }
      }
    }
    if (s < count) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const char* a = products + codes.indices[r * count + s] * row_bytes;
        const __m512i one = broadcast_one(codes.values + r * count + s);
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
          const __m512i rows_a = load_int(a + g * 64);
          sum[r][2 * g] = _mm512_dpwssd_epi32(sum[r][2 * g], _mm512_unpacklo_epi16(rows_a, rows_a), one);
          sum[r][2 * g + 1] = _mm512_dpwssd_epi32(sum[r][2 * g + 1], _mm512_unpackhi_epi16(rows_a, rows_a), one);
        }
      }
    }
    codes = codes.at(layer.out_features * count);
    products += layer.n_atoms * row_bytes;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 2 * G; ++v) _mm512_storeu_si512(out + r * pitch + v * kLanes, sum[r][v]);
  }
}

// Codes are read once a tile, a run of rows in each block: the hardware prefetcher learns of each run too late.
template <typename Number>
void prefetch(const Number* numbers, int64_t n) {
  const char* memory = reinterpret_cast<const char*>(numbers);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(Number)); i += 64) _mm_prefetch(memory + i, _MM_HINT_T1);
}

// A pass takes as many blocks as have their products in L1 together, so that sums, which do not stay there, come and
// go once a pass.
template <int G, typename Index, typename Value>
void add_blocks(const DsLinear& layer, const Tile& tile, int64_t first, int64_t n_rows, int32_t* out) {
  constexpr int64_t pitch = G * kGroup;
  constexpr int R = 4;  // with two groups, 16 sums
  const int64_t count = layer.n_nonzero, block_codes = layer.out_features * count;
  const Codes<Index, Value> codes{static_cast<const Index*>(layer.indices) + first * count,
                                  static_cast<const Value*>(layer.values) + first * count};
  for (int64_t block = 0; block < layer.n_blocks; block += tile.pass_blocks) {
    const int64_t n_blocks = smaller(tile.pass_blocks, layer.n_blocks - block);
    const char* products = static_cast<const char*>(tile.products) + block * layer.n_atoms * pitch * sizeof(int16_t);
    const Codes<Index, Value> here = codes.at(block * block_codes);
    for (int64_t next = n_blocks; next < smaller(2 * tile.pass_blocks, layer.n_blocks - block); ++next) {
      prefetch(here.at(next * block_codes).indices, n_rows * count);
      prefetch(here.at(next * block_codes).values, n_rows * count);
    }
    int64_t r = 0;
    for (; r + R <= n_rows; r += R) {
      accumulate<R, G>(layer, here.at(r * count), n_blocks, products, out + r * pitch, block == 0);
    }
    for (; r < n_rows; ++r) {
      accumulate<1, G>(layer, here.at(r * count), n_blocks, products, out + r * pitch, block == 0);
    }
  }
}

// sums (count, pitch) -> y (tokens, M), columns [first, first + count).
void finish(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count, const int32_t* sums) {
  const float* factors = factors_at(layer, tile);
  for (int64_t t = 0; t < tile.tokens; t += kLanes) {
    const Vec factor = load(factors + t);
    for (int64_t m = 0; m < count; m += kLanes) {
      const int64_t columns = smaller(kLanes, count - m);
      Vec v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i >= columns) {
          v[i] = zero();
          continue;
        }
        const Vec sum = _mm512_cvtepi32_ps(load_int(sums + (m + i) * tile.pitch + t));
        const Vec bias = layer.bias ? broadcast(layer.bias + first + m + i) : zero();
        v[i] = fma(sum * broadcast(layer.scales + first + m + i), factor, bias);
        if (layer.gelu) v[i] = gelu(v[i]);
      }
      float* y = tile.y + t * layer.out_features + first + m;
      store_transposed(v, y, layer.out_features, columns, tile.tokens - t);
    }
  }
}

template <int G>
void sparse_tile(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count) {
  int32_t* sums = static_cast<int32_t*>(tile.sums) + first * G * kGroup;
  const auto add = layer.number == Number::int8
                       ? (layer.wide ? add_blocks<G, uint16_t, int8_t> : add_blocks<G, uint8_t, int8_t>)
                       : (layer.wide ? add_blocks<G, uint16_t, int16_t> : add_blocks<G, uint8_t, int16_t>);
  add(layer, tile, first, count, sums);
  finish(layer, tile, first, count, sums);
}

void sparse(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count) {
  switch (tile.pitch / kGroup) {
    case 1: return sparse_tile<1>(layer, tile, first, count);
    case 2: return sparse_tile<2>(layer, tile, first, count);
  }
}

TileFloats tile_floats(const DsLinear& layer, int64_t pitch) {
  const int64_t products = layer.n_blocks * layer.n_atoms * pitch;
  return {products / 2, layer.out_features * pitch, (layer.n_blocks * pairs_of(layer.width) + 1) * pitch};
}

// Few tokens leave most of a vector empty.
bool suits(const DsLinear& layer, int64_t tokens) {
  return (layer.number == Number::int16 || layer.number == Number::int8) && tokens > kGroup / 4;
}

}  // namespace

extern const DsLinearTier ds_linear_avx512vnni = {
    kGroup,  2 * kGroup, 2 * kGroup, kStepRows, 0.75f,   sizeof(int16_t), tile_floats, suits, &ds_linear_avx512,
    nullptr, kLanes,     prepare,    dense,     sparse,  normalize};

}  // namespace dsformer
