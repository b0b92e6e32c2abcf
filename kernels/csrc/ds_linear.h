// The op's computation, free of ONNX Runtime: y = sum_i S_i (D_i x_i) + bias, an activation, and perhaps a residual and
// a layer normalization.
//
// Work is cut into tiles of tokens, and lanes of a vector are tokens: a nonzero of S then costs one broadcast and
// plain vector loads, with no gather. Phases, each a set of independent tasks:
//   prepare    (some tokens):         X in integers, only in tiers that compute in them;
//   dense      (tile, block):         products_i = D_i x_i, after transposing the tile's part of X;
//   sparse     (tile, chunk of rows): all blocks' S_i products_i, bias, activation, transposed back into Y;
//   normalize  (some tokens):         residual and layer normalization, only in layers that have them.
// FORMAT.md has the layouts and the reasons for the tile sizes.
//
// Compiled under different instruction-set flags: plain structs only, no inline functions (see omp.h).
#pragma once
#include <cstddef>
#include <cstdint>

namespace dsformer {

// Tiles of floats. At most four AVX-512 vectors, enough independent FMA chains with two rows in flight; at least two:
// with one, a nonzero's index and value cost more than its product. FORMAT.md section 3 has the measurements.
constexpr int64_t kMinTileTokens = 32, kMaxTileTokens = 64;
constexpr float kL1Share = 1.5f;

// Norm of the longest atom that int16 dictionaries may have (FORMAT.md section 4).
constexpr int kAtomBits = 14;
constexpr int64_t kLongestAtom = int64_t{1} << kAtomBits;

// What dictionary and values are stored as.
enum class Number { float32, float16, int16 };

// A layer's weights, used where ONNX Runtime keeps them.
struct DsLinear {
  int64_t in_features;   // N
  int64_t out_features;  // M
  int64_t n_blocks;      // N/B
  int64_t width;         // B
  int64_t n_atoms;       // K
  int64_t n_nonzero;     // S
  Number number;
  bool wide;             // indices are uint16, else uint8
  bool gelu;
  const void* dictionary;  // (N/B, K, B)
  const void* indices;     // (N/B, M, S), each below K
  const void* values;      // (N/B, M, S)
  const float* bias;         // (M) or null
  const float* scales;       // (M), what the sums of int16 weights are multiplied by; null for floats
  const float* norm_weight;  // (M), or null: no layer normalization
  const float* norm_bias;    // (M)
  float norm_epsilon;        // added to the variance
};

// Consecutive tokens and their scratch. What lanes from `tokens` up to `pitch` hold is never stored in y.
struct Tile {
  const float* x;   // (tokens, N)
  float* y;         // (tokens, M)
  int64_t tokens;
  int64_t pitch;    // tokens rounded up to the tier's lanes, at most its max_tokens
  void* products;   // (N/B, K, pitch), float32 or the tier's integers
  void* sums;       // (M, pitch), of 4 bytes
  void* prepared;   // the tile's part of X as the tier's `prepare` left it
  int64_t pass_blocks;  // blocks whose products fit into the tier's share of L1 together; at least 1
};

struct DsLinearTier {
  int64_t lanes;          // tokens per vector
  int64_t min_tokens;     // in a tile, if the call has as many
  int64_t max_tokens;
  float l1_share;         // what a tile's products of one block may take of L1
  int64_t product_bytes;  // of one number of D_i x_i
  // Null, or what comes before `dense`: tokens [first, first + kPreparedTokens) of the tile, in integers.
  void (*prepare)(const DsLinear& layer, const Tile& tile, int64_t first);
  void (*dense)(const DsLinear& layer, const Tile& tile, int64_t block);
  // Rows [first, first + count) of the output.
  void (*sparse)(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count);
  // y (tokens, M) in place: the residual (tokens, M) added if there is one, the layer's normalization if it has one.
  void (*normalize)(const DsLinear& layer, const float* residual, float* y, int64_t tokens);
  // The tier for what this one does not suit: float weights, calls of few tokens. Null: it suits everything.
  const DsLinearTier* plain;
};

constexpr int64_t kPreparedTokens = 16;

extern const DsLinearTier ds_linear_scalar;
#if defined(__x86_64__)
extern const DsLinearTier ds_linear_avx2;
extern const DsLinearTier ds_linear_avx512;
extern const DsLinearTier ds_linear_avx512vnni;
#endif

// The tier to use for a call: `tier`, or its plain one.
const DsLinearTier& suited(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens);

// How a call is cut up.
struct Plan {
  int64_t tile_tokens;
  int64_t chunk_rows;
  int64_t group_tiles;     // tiles that are in scratch at once
  int64_t tile_floats;     // scratch of one tile
  int64_t scratch_floats;  // of a whole group
};

Plan make_plan(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens);

// Runs body(data, i) for i in [0, n_tasks), in any order, on any threads; returns when all are done.
struct Executor {
  void* context;
  void (*run)(void* context, void (*body)(void* data, size_t task), size_t n_tasks, void* data);
};

// x (tokens, N), residual (tokens, M) or null, y (tokens, M), scratch of plan.scratch_floats floats, 64-byte aligned.
void ds_linear(const DsLinear& layer, const DsLinearTier& tier, const Plan& plan, const float* x, const float* residual,
               float* y, int64_t tokens, float* scratch, const Executor& executor);

}  // namespace dsformer
