// The op's computation, free of ONNX Runtime: y = sum_i S_i (D_i x_i) + bias, an activation, and perhaps a residual and
// a layer normalization.
//
// Work is cut into tiles of tokens, and lanes of a vector are tokens: a nonzero of S then costs one broadcast and
// plain vector loads, with no gather. Phases, each a set of independent tasks:
//   prepare    (some tokens):         X in integers, only in tiers that compute in them, and perhaps the products;
//   dense      (tile, block):         products_i = D_i x_i, after transposing the tile's part of X, if not yet done;
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
constexpr int64_t kStepRows = 16;
// Integers: rows of products are half as long, and passes of blocks spare the sums more than wide tiles would.
constexpr float kIntegersShare = 1.0f;

// Bits of the norm of the longest atom that int16 dictionaries may have (FORMAT.md section 4).
constexpr int kAtomBits = 14;

// What dictionary and values are stored as.
enum class Number { float32, float16, int16, int8 };

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
  int atom_bits;         // of integer dictionaries: no atom's norm exceeds 2 to this
  bool gelu;
  const void* dictionary;  // (N/B, K, B)
  const void* indices;     // (N/B, M, S), each below K
  const void* values;      // (N/B, M, S)
  const float* bias;         // (M) or null
  const float* scales;       // (M), what the sums of integer weights are multiplied by; null for floats
  const float* norm_weight;  // (M), or null: no layer normalization
  const float* norm_bias;    // (M)
  float norm_epsilon;        // added to the variance
  const void* packed;        // the weights in the order of the tier that has packed them, or null
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

// Scratch of a tile, in floats.
struct TileFloats {
  int64_t products, sums, prepared;
};

// Gives memory that is 64-byte aligned, and throws if there is none.
struct Allocator {
  void* context;
  void* (*allocate)(void* context, size_t bytes);
};

struct DsLinearTier {
  int64_t lanes;          // a tile's tokens are rounded up to these
  int64_t min_tokens;     // in a tile, if the call has as many
  int64_t max_tokens;
  int64_t step_rows;      // a chunk has a multiple of these
  float l1_share;         // what a tile's products of one block may take of L1
  int64_t product_bytes;  // of one number of D_i x_i
  TileFloats (*tile_floats)(const DsLinear& layer, int64_t pitch);
  // Whether the tier can work, and well, on the layer's weights and so many tokens; else `plain` does.
  bool (*suits)(const DsLinear& layer, int64_t tokens);
  const DsLinearTier* plain;  // null in tiers that suit everything
  // Null, or what a session does once: the layer's weights in an order of the tier's own.
  const void* (*pack)(const DsLinear& layer, const Allocator& allocator);
  // Null, or what comes first: tokens [first, first + prepared_tokens) of the tile.
  int64_t prepared_tokens;
  void (*prepare)(const DsLinear& layer, const Tile& tile, int64_t first);
  // Null in tiers whose `prepare` makes the products.
  void (*dense)(const DsLinear& layer, const Tile& tile, int64_t block);
  // Rows [first, first + count) of the output.
  void (*sparse)(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count);
  // y (tokens, M) in place: the residual (tokens, M) added if there is one, the layer's normalization if it has one.
  void (*normalize)(const DsLinear& layer, const float* residual, float* y, int64_t tokens);
};

// tile_floats and suits of the tiers that compute in float32.
TileFloats float_tile(const DsLinear& layer, int64_t pitch);
bool suits_all(const DsLinear& layer, int64_t tokens);

extern const DsLinearTier ds_linear_scalar;
#if defined(__x86_64__)
extern const DsLinearTier ds_linear_floats_avx2;
extern const DsLinearTier ds_linear_floats_avx512;
extern const DsLinearTier ds_linear_avx2;
extern const DsLinearTier ds_linear_avx512;
extern const DsLinearTier ds_linear_avx512vnni;
extern const DsLinearTier ds_linear_avx512vbmi;
#endif

// The tier to use for a call: `tier`, or a plainer one.
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
