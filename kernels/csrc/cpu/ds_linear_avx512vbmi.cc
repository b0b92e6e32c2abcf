// AVX-512 VBMI and VNNI: int8 weights times tokens in 8-bit integers, with 32-bit sums. FORMAT.md section 5 has the
// scales, and the order in which `pack` lays the weights out.
//
// Lanes are rows here, not tokens. What a nonzero of S picks is a number out of a token's products of one block; as
// bytes, 128 of them fit into two registers, and one instruction (vpermi2b) picks 64 at once: for 16 rows four codes
// each, which another (vpdpbusd) multiplies by their values and adds up. Products are not loaded a nonzero, sums stay in
// registers over all blocks, and X and Y are used as they lie, with no transpositions.
#include <immintrin.h>

#include <cstring>

#include "../ds_linear.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"
#include "squares.inc"
#include "normalize.inc"

// Tokens and vectors in flight, so that sums, and in the sparse half banks, fill the 32 registers.
constexpr int64_t kDenseTokens = 4, kSparseTokens = 5;
constexpr int64_t kGroups = 3;  // of 16 rows, in the sparse half
constexpr int64_t kRows = kGroups * kLanes;
constexpr int64_t kPrepared = 8;  // tokens of a task of `prepare`, which find a block's atoms in L1 after the first
constexpr int64_t kTileTokens = 64;
constexpr int64_t kBank = 128;       // products that one lookup can choose from
constexpr int64_t kQuad = 4;         // codes of a row that one lookup picks
constexpr int64_t kQuadBytes = 128;  // 64 indices, 64 values
// Atoms of all blocks together, whose 16-bit products of a few tokens `prepare` has on its stack: 256 KiB.
constexpr int64_t kMostAtoms = 16384;
constexpr int64_t kMostBanks = kMostAtoms / 64;
constexpr int64_t kMostWidth = 1024;
constexpr int64_t kMostCodes = 100000;  // of a row: their sum has 31 bits
// Numbers of a token's largest block below this are zero, as its inverse would leave float32's range.
constexpr float kTiny = 1e-30f;
// Taken out of a token's scale, and put into the rows', so that the product of large numbers stays within float32.
constexpr float kUnit = 0x1p-20f;

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }


// sum's 16 lanes += four bytes without a sign times four with one. Around the intrinsic, GCC 12 copies sums from
// register to register and to the stack.
[[gnu::always_inline]] inline void multiply_add(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

// erf(x / √2) within 1e-4 by an odd polynomial, and GELU within 1.7e-4: a fit made for this file. The exact one (gelu.inc)
// takes three times as long, and the next layer rounds to 8 bits what comes of it.
Vec gelu(Vec x) {
  constexpr int kSmallerMagnitude = 2;  // of the two, with the sign of the first
  const Vec y = _mm512_range_ps(x, broadcast_value(3.95f), kSmallerMagnitude), t = y * y;
  Vec p = broadcast_value(0x1.a410cap-25f);
  p = fma(p, t, broadcast_value(-0x1.c37b90p-19f));
  p = fma(p, t, broadcast_value(0x1.9fcac8p-14f));
  p = fma(p, t, broadcast_value(-0x1.b2b9a6p-10f));
  p = fma(p, t, broadcast_value(0x1.21c8f2p-6f));
  p = fma(p, t, broadcast_value(-0x1.091c12p-3f));
  p = fma(p, t, broadcast_value(0x1.978a0ep-1f));
  // At the ends of the range the product exceeds 1.
  const Vec erf = _mm512_range_ps(p * y, broadcast_value(1.0f), kSmallerMagnitude);
  const Vec half_x = x * broadcast_value(0.5f);
  return fma(half_x, erf, half_x);
}

#include "banks.inc"

// ---- dense phase ----

// What `prepare` leaves beside the products: a factor a token, (pitch).
float* factors_at(const Tile& tile) { return static_cast<float*>(tile.prepared); }

int64_t block_bytes(const Layout& l) { return l.banks * l.slot; }
int64_t token_bytes(const DsLinear& layer, const Layout& l) { return layer.n_blocks * block_bytes(l); }

// The largest magnitude among a block's numbers, in some lane, as an integer: floats without a sign compare alike, and
// NaN is above all.
Vec magnitudes(const float* x, int64_t width) {
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t b = 0; b < width; b += kLanes) {
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(load_some(x + b, width - b)), no_sign));
  }
  return _mm512_castsi512_ps(largest);
}

// For each block of a token: the scale that makes bytes of it, and what a unit of these is worth, in units of its
// products after their shift. Both are zero for a block of zeros; the unit of one with a number that is not finite is NaN.
void measure(const DsLinear& layer, const float* x, float shifted, float* scales, float* units) {
  const Vec all = broadcast_value(127.0f), tiny = broadcast_value(kTiny), infinity = broadcast_value(__builtin_inff());
  for (int64_t block = 0; block < layer.n_blocks; block += kLanes) {
    const int64_t n = smaller(kLanes, layer.n_blocks - block);
    Vec v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      v[i] = i < n ? magnitudes(x + (block + i) * layer.width, layer.width) : zero();
    }
    transpose(v);
    for (int64_t step = kLanes / 2; step > 0; step /= 2) {
      for (int64_t i = 0; i < step; ++i) {
        v[i] = _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(v[i]), _mm512_castps_si512(v[i + step])));
      }
    }
    const __mmask16 usable = _mm512_cmp_ps_mask(v[0], tiny, _CMP_GT_OQ) & _mm512_cmp_ps_mask(v[0], infinity, _CMP_LT_OQ);
    const __mmask16 not_finite = _mm512_cmp_ps_mask(v[0], infinity, _CMP_NLT_UQ);
    const Vec unit = _mm512_maskz_mul_ps(usable, v[0], broadcast_value(shifted / 127.0f));
    store_first(scales + block, n, _mm512_maskz_div_ps(usable, all, v[0]));
    store_first(units + block, n, _mm512_mask_mov_ps(unit, not_finite, broadcast_value(__builtin_nanf(""))));
  }
}

// One block of a token as bytes, 128 more than they are.
void quantize(const float* x, int64_t width, float scale, uint8_t* out) {
  // Packing works in 128-bit parts; the permutation puts theirs in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t b = 0; b < width; b += 64) {
    __m512i v[4];
    for (int64_t i = 0; i < 4; ++i) {
      // Not-a-number times zero is some integer, which a NaN unit makes up for.
      const int64_t first = b + i * kLanes;
      v[i] = _mm512_cvtps_epi32(load_some(x + first, width - first) * broadcast_value(scale));
    }
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    store_int(out + b, _mm512_xor_si512(_mm512_permutexvar_epi32(order, packed), _mm512_set1_epi8(-128)));
  }
}

// R vectors of atoms times T tokens -> 16-bit products, and the largest magnitudes among them.
template <int R, int T>
void multiply(const int8_t* atoms, const int32_t* corrections, int64_t columns, const uint8_t* x, int64_t x_pitch,
              __m128i shift, int16_t* products, int64_t pitch, __m512i* largest) {
  __m512i sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 5
    for (int t = 0; t < T; ++t) sum[r][t] = load_int(corrections + r * kLanes);
  }
  for (int64_t b = 0; b < columns; b += 4) {
    __m512i four[T];
#pragma GCC unroll 5
    for (int t = 0; t < T; ++t) {
      int32_t bytes;
      std::memcpy(&bytes, x + t * x_pitch + b, sizeof bytes);
      four[t] = _mm512_set1_epi32(bytes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i atom = load_int(atoms + r * kLanes * columns + b * kLanes);
#pragma GCC unroll 5
      for (int t = 0; t < T; ++t) multiply_add(sum[r][t], four[t], atom);
    }
  }
#pragma GCC unroll 5
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 5
    for (int r = 0; r < R; r += 2) {
      const __m512i next = r + 1 < R ? _mm512_sra_epi32(sum[r + (r + 1 < R)][t], shift) : _mm512_setzero_si512();
      const __m512i pair = _mm512_packs_epi32(_mm512_sra_epi32(sum[r][t], shift), next);
      largest[t] = _mm512_max_epi16(largest[t], _mm512_abs_epi16(pair));
      store_int(products + t * pitch + r * kLanes, pair);
    }
  }
}

// All atoms of a bank, `vectors` of 16.
template <int T>
void multiply_bank(const int8_t* atoms, const int32_t* corrections, int64_t vectors, int64_t columns, const uint8_t* x,
                   int64_t x_pitch, __m128i shift, int16_t* products, int64_t pitch, __m512i* largest) {
  const auto some = [&](auto multiply, int64_t n) {
    multiply(atoms, corrections, columns, x, x_pitch, shift, products, pitch, largest);
    atoms += n * kLanes * columns;
    corrections += n * kLanes;
    products += n * kLanes;
    vectors -= n;
  };
  while (vectors >= 6) some(multiply<6, T>, 6);
  if (vectors >= 4) some(multiply<4, T>, 4);
  if (vectors >= 2) some(multiply<2, T>, 2);
  if (vectors >= 1) some(multiply<1, T>, 1);
}

template <int T>
void multiply_block(const DsLinear& layer, const Layout& l, int64_t block, const uint8_t* x, int64_t x_pitch,
                    int16_t* products, int64_t pitch, __m512i* largest) {
  const __m128i shift = _mm_cvtsi32_si128(header(layer).shift);
  const int64_t vector_bytes = kLanes * l.columns, whole = vectors_of(l.bank_atoms);
  for (int64_t bank = 0; bank < l.banks; ++bank) {
    const int64_t vector = block * l.vectors + bank * whole, n = smaller(whole, l.vectors - bank * whole);
    multiply_bank<T>(at<int8_t>(layer.packed, l.dictionary) + vector * vector_bytes,
                     at<int32_t>(layer.packed, l.corrections) + vector * kLanes, n, l.columns, x, x_pitch, shift,
                     products + bank * l.slot, pitch, largest);
  }
}

// The largest of 32 magnitudes of 16 bits, two a lane, as floats.
Vec wider(__m512i largest) {
  const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(half));
}

// 16-bit products of a token -> bytes, 128 more than they are, in a unit that all its blocks share: largest / 127.
// Returns the unit.
float shrink(const DsLinear& layer, const Layout& l, const int16_t* products, const float* units, float largest,
             uint8_t* out) {
  Vec most = zero(), sum = zero();
  for (int64_t block = 0; block < layer.n_blocks; block += kLanes) {
    const Vec some = load_first(units + block, smaller(kLanes, layer.n_blocks - block));
    most = max(most, some);
    sum = sum + some;  // not a number if one of them is none
  }
  const float not_finite = _mm512_reduce_add_ps(sum);
  if (__builtin_isnan(not_finite)) return not_finite;
  // A factor below one is what the instruction takes.
  const float least = _mm512_reduce_max_ps(most), unit = largest / 127.0f > least ? largest / 127.0f : least;
  const Vec inverse = broadcast_value(unit > 0 ? 32768.0f / unit : 0.0f);
  alignas(64) int32_t factors[kMostAtoms / 64 + kLanes];
  for (int64_t block = 0; block < layer.n_blocks; block += kLanes) {
    const Vec exact = load_first(units + block, smaller(kLanes, layer.n_blocks - block)) * inverse;
    store_int(factors + block, _mm512_cvtps_epi32(_mm512_min_ps(exact, broadcast_value(32767.0f))));
  }
  const __m512i offset = _mm512_set1_epi8(-128);
  for (int64_t block = 0; block < layer.n_blocks; ++block) {
    const __m512i factor = _mm512_set1_epi16(static_cast<int16_t>(factors[block]));
    for (int64_t k = block * block_bytes(l); k < (block + 1) * block_bytes(l); k += 64) {
      const int16_t* from = products + k;
      const __m512i low = _mm512_mulhrs_epi16(load_int(from), factor);
      const __m512i high = _mm512_mulhrs_epi16(load_int(from + 32), factor);
      store_int(out + k, _mm512_xor_si512(_mm512_packs_epi16(low, high), offset));
    }
  }
  return unit;
}

// T tokens at x -> products, units (N/B a token), and for each the largest product.
template <int T>
void multiply_tokens(const DsLinear& layer, const Layout& l, int64_t block, const uint8_t* x, int64_t x_pitch,
                     int16_t* products, int64_t pitch, const float* units, Vec* largest) {
  __m512i most[T];
  for (int t = 0; t < T; ++t) most[t] = _mm512_setzero_si512();
  multiply_block<T>(layer, l, block, x, x_pitch, products, pitch, most);
  for (int t = 0; t < T; ++t) largest[t] = max(wider(most[t]) * broadcast(units + t * layer.n_blocks), largest[t]);
}

void prepare(const DsLinear& layer, const Tile& tile, int64_t first) {
  const Layout l = layout_of(layer);
  const int64_t pitch = token_bytes(layer, l);
  alignas(64) int16_t products[kPrepared * kMostAtoms];
  alignas(64) uint8_t x[kPrepared * (kMostWidth + 64)];
  float units[kPrepared * kMostAtoms / 64], scales[kPrepared * kMostAtoms / 64];
  Vec largest[kPrepared];
  const int64_t tokens = smaller(kPrepared, tile.tokens - first), x_pitch = round_up(layer.width, 64);
  const float* from = tile.x + first * layer.in_features;
  const float shifted = static_cast<float>(1 << header(layer).shift) * kUnit;
  for (int64_t t = 0; t < tokens; ++t) {
    measure(layer, from + t * layer.in_features, shifted, scales + t * layer.n_blocks, units + t * layer.n_blocks);
    largest[t] = zero();
  }
  for (int64_t block = 0; block < layer.n_blocks; ++block) {
    for (int64_t t = 0; t < tokens; ++t) {
      quantize(from + t * layer.in_features + block * layer.width, layer.width, scales[t * layer.n_blocks + block],
               x + t * x_pitch);
    }
    for (int64_t t = 0; t < tokens; t += kDenseTokens) {
      const auto some = tokens - t >= 4   ? multiply_tokens<4>
                        : tokens - t == 3 ? multiply_tokens<3>
                        : tokens - t == 2 ? multiply_tokens<2>
                                          : multiply_tokens<1>;
      some(layer, l, block, x + t * x_pitch, x_pitch, products + t * pitch + block * block_bytes(l), pitch,
           units + t * layer.n_blocks + block, largest + t);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    uint8_t* out = static_cast<uint8_t*>(tile.products) + (first + t) * pitch;
    factors_at(tile)[first + t] = shrink(layer, l, products + t * pitch, units + t * layer.n_blocks,
                                         _mm512_reduce_max_ps(largest[t]), out);
  }
}

// ---- sparse phase ----

// 64 products out of a bank of 64 or 128 by their places.
template <int Registers>
__m512i look_up(const __m512i* bank, __m512i places) {
  return Registers == 1 ? _mm512_permutexvar_epi8(places, bank[0])
                        : _mm512_permutex2var_epi8(bank[0], places, bank[1]);
}

// The sums of kRows rows for T tokens, whose products begin at `products`.
template <int Registers, int T>
[[gnu::always_inline]] inline void accumulate(const DsLinear& layer, const Layout& l, int64_t group,
                                              const uint8_t* products, __m512i (*sum)[T]) {
  const int64_t pitch = token_bytes(layer, l);
  const int32_t* starts = at<int32_t>(layer.packed, l.row_starts) + group * kRows;
#pragma GCC unroll 5
  for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 5
    for (int t = 0; t < T; ++t) sum[g][t] = load_int(starts + g * kLanes);
  }
  const uint16_t* counts = at<uint16_t>(layer.packed, l.counts) + group * layer.n_blocks * l.banks;
  const char* codes = at<char>(layer.packed, l.codes + at<int64_t>(layer.packed, l.firsts)[group]);
  for (int64_t block = 0; block < layer.n_blocks; ++block) {
    for (int64_t n_banks = l.banks; n_banks > 0; --n_banks, products += l.slot) {
      __m512i bank[T][Registers];
#pragma GCC unroll 5
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int r = 0; r < Registers; ++r) bank[t][r] = load_int(products + t * pitch + r * 64);
      }
      for (int n = *counts++; n > 0; --n) {
#pragma GCC unroll 5
        for (int g = 0; g < kGroups; ++g, codes += kQuadBytes) {
          const __m512i places = load_int(codes), values = load_int(codes + 64);
#pragma GCC unroll 5
          for (int t = 0; t < T; ++t) {
            multiply_add(sum[g][t], look_up<Registers>(bank[t], places), values);
          }
        }
      }
    }
  }
}

// kRows rows for T tokens, the first of which is `token`, into Y.
template <int Registers, int T>
void sparse_rows(const DsLinear& layer, const Layout& l, const Tile& tile, int64_t group, int64_t token) {
  __m512i sum[kGroups][T];
  const uint8_t* products = static_cast<const uint8_t*>(tile.products) + token * token_bytes(layer, l);
  accumulate<Registers, T>(layer, l, group, products, sum);
  const float* scales = at<float>(layer.packed, l.row_scales) + group * kRows;
  const float* factors = factors_at(tile) + token;
#pragma GCC unroll 5
  for (int g = 0; g < kGroups; ++g) {
    const int64_t row = group * kRows + g * kLanes, n = smaller(kLanes, layer.out_features - row);
    if (n <= 0) return;
    const Vec scale = load(scales + g * kLanes), bias = layer.bias ? load_first(layer.bias + row, n) : zero();
#pragma GCC unroll 5
    for (int t = 0; t < T; ++t) {
      Vec y = fma(_mm512_cvtepi32_ps(sum[g][t]) * scale, broadcast(factors + t), bias);
      if (layer.gelu) y = gelu(y);
      store_first(tile.y + (token + t) * layer.out_features + row, n, y);
    }
  }
}

// Tokens are the outer loop: their banks stay in L1 while the codes of all rows come by.
template <int Registers>
void sparse_tile(const DsLinear& layer, const Layout& l, const Tile& tile, int64_t first, int64_t count) {
  for (int64_t t = 0; t < tile.tokens; t += kSparseTokens) {
    const auto rows = tile.tokens - t >= 5   ? sparse_rows<Registers, 5>
                      : tile.tokens - t == 4 ? sparse_rows<Registers, 4>
                      : tile.tokens - t == 3 ? sparse_rows<Registers, 3>
                      : tile.tokens - t == 2 ? sparse_rows<Registers, 2>
                                             : sparse_rows<Registers, 1>;
    for (int64_t row = first; row < first + count; row += kRows) rows(layer, l, tile, row / kRows, t);
  }
}

void sparse(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count) {
  const Layout l = layout_of(layer);
  (l.slot == 64 ? sparse_tile<1> : sparse_tile<2>)(layer, l, tile, first, count);
}

TileFloats tile_floats(const DsLinear& layer, int64_t pitch) {
  return {pitch * token_bytes(layer, layout_of(layer)) / 4, 0, pitch};
}

bool suits(const DsLinear& layer, int64_t) {
  return layer.number == Number::int8 && layer.n_blocks * round_up(layer.n_atoms, kBank) <= kMostAtoms &&
         layer.width <= kMostWidth && layer.n_blocks * layer.n_nonzero <= kMostCodes;
}

}  // namespace

extern const DsLinearTier ds_linear_avx512vbmi = {
    1,            kTileTokens, kTileTokens, kRows,   1.0f,   sizeof(int8_t), tile_floats, suits,
    &ds_linear_avx512vnni, pack, kPrepared, prepare, nullptr, sparse, normalize};

}  // namespace dsformer
