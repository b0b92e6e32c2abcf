// Cuts a call into tiles, chunks and tasks. The arithmetic is in cpu/.
#include "ds_linear.h"

#include <unistd.h>

#include <algorithm>

namespace dsformer {
namespace {

// Scratch of one group of tiles: 1 MiB, so that what the dense phase writes is still in L2 for the sparse one, and a
// large batch needs no memory in proportion. One tile has tasks enough for some threads.
constexpr int64_t kGroupFloats = int64_t{1} << 18;
// Tasks a sparse phase should have, so that a pool of some threads balances.
constexpr int64_t kWantedTasks = 16;
// Least use of a row of products in a chunk of output rows, to pay for bringing it into L1; and the least rows.
constexpr int64_t kMinUses = 16;
constexpr int64_t kMinChunkRows = 64;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t l1_bytes() {
  static const int64_t bytes_known = [] {
    long bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return static_cast<int64_t>(bytes > 0 ? bytes : 32 * 1024);
  }();
  return bytes_known;
}

// Tokens of one block, or of some blocks together, whose products fit into the tier's share of L1.
int64_t fitting_tokens(const DsLinear& layer, const DsLinearTier& tier) {
  const auto room = static_cast<int64_t>(tier.l1_share * static_cast<float>(l1_bytes()));
  return room / (layer.n_atoms * tier.product_bytes);
}

// The tile rule of FORMAT.md.
int64_t tile_tokens(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens) {
  const int64_t fitting = fitting_tokens(layer, tier) / tier.lanes * tier.lanes;
  const int64_t tile = std::clamp(fitting, tier.min_tokens, tier.max_tokens);
  return std::min(tile, round_up(tokens, tier.lanes));
}

// Scratch of one tile's products, in floats.
int64_t product_floats(const DsLinear& layer, const DsLinearTier& tier, int64_t pitch) {
  return layer.n_blocks * layer.n_atoms * pitch * tier.product_bytes / static_cast<int64_t>(sizeof(float));
}

// Scratch of one tile of X in integers: a number for each pair of columns, and a factor, a token.
int64_t prepared_floats(const DsLinear& layer, const DsLinearTier& tier, int64_t pitch) {
  return tier.prepare ? (layer.n_blocks * ((layer.width + 1) / 2) + 1) * pitch : 0;
}

// Tokens of one task of the last phase: enough to be worth a task, few enough that even a short text makes several.
constexpr int64_t kNormalizedTokens = 8;

struct Group {
  const DsLinear& layer;
  const DsLinearTier& tier;
  const Plan& plan;
  const float* x;
  const float* residual;
  float* y;
  int64_t tokens;
  float* scratch;
  int64_t n_chunks;

  Tile tile(int64_t i) const {
    const int64_t first = i * plan.tile_tokens;
    const int64_t count = std::min(plan.tile_tokens, tokens - first);
    const int64_t pitch = round_up(count, tier.lanes);
    float* sums = scratch + i * plan.tile_floats;
    float* products = sums + layer.out_features * pitch;
    float* prepared = products + product_floats(layer, tier, pitch);
    return {x + first * layer.in_features, y + first * layer.out_features, count, pitch, products, sums, prepared,
            std::max<int64_t>(1, fitting_tokens(layer, tier) / pitch)};
  }
};

void prepare_task(void* data, size_t task) {
  const Group& group = *static_cast<const Group*>(data);
  const int64_t first = static_cast<int64_t>(task) * kPreparedTokens, tile_tokens = group.plan.tile_tokens;
  group.tier.prepare(group.layer, group.tile(first / tile_tokens), first % tile_tokens);
}

void dense_task(void* data, size_t task) {
  const Group& group = *static_cast<const Group*>(data);
  const auto i = static_cast<int64_t>(task);
  group.tier.dense(group.layer, group.tile(i / group.layer.n_blocks), i % group.layer.n_blocks);
}

void sparse_task(void* data, size_t task) {
  const Group& group = *static_cast<const Group*>(data);
  const auto i = static_cast<int64_t>(task);
  const int64_t first = i % group.n_chunks * group.plan.chunk_rows;
  group.tier.sparse(group.layer, group.tile(i / group.n_chunks), first,
                    std::min(group.plan.chunk_rows, group.layer.out_features - first));
}

void normalize_task(void* data, size_t task) {
  const Group& group = *static_cast<const Group*>(data);
  const int64_t first = static_cast<int64_t>(task) * kNormalizedTokens, start = first * group.layer.out_features;
  group.tier.normalize(group.layer, group.residual ? group.residual + start : nullptr, group.y + start,
                       std::min(kNormalizedTokens, group.tokens - first));
}

size_t tasks_of(int64_t n, int64_t each) { return static_cast<size_t>((n + each - 1) / each); }

}  // namespace

const DsLinearTier& suited(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens) {
  const bool few = tokens <= tier.lanes / 4;
  return tier.plain && (few || layer.number != Number::int16) ? *tier.plain : tier;
}

Plan make_plan(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens) {
  Plan plan;
  plan.tile_tokens = tile_tokens(layer, tier, tokens);
  const int64_t n_tiles = round_up(tokens, plan.tile_tokens) / plan.tile_tokens;
  plan.tile_floats = product_floats(layer, tier, plan.tile_tokens) + layer.out_features * plan.tile_tokens +
                     prepared_floats(layer, tier, plan.tile_tokens);
  plan.group_tiles = std::clamp<int64_t>(kGroupFloats / plan.tile_floats, 1, n_tiles);
  plan.scratch_floats = plan.group_tiles * plan.tile_floats;

  const int64_t wanted_chunks = round_up(kWantedTasks, plan.group_tiles) / plan.group_tiles;
  const int64_t rows = (layer.out_features + wanted_chunks - 1) / wanted_chunks;
  const int64_t paying_rows = kMinUses * layer.n_atoms / layer.n_nonzero;
  plan.chunk_rows = round_up(std::max({rows, paying_rows, kMinChunkRows}), 16);
  return plan;
}

void ds_linear(const DsLinear& layer, const DsLinearTier& tier, const Plan& plan, const float* x, const float* residual,
               float* y, int64_t tokens, float* scratch, const Executor& executor) {
  const int64_t group_tokens = plan.group_tiles * plan.tile_tokens;
  const int64_t n_chunks = round_up(layer.out_features, plan.chunk_rows) / plan.chunk_rows;
  for (int64_t first = 0; first < tokens; first += group_tokens) {
    const int64_t count = std::min(group_tokens, tokens - first);
    const int64_t n_tiles = round_up(count, plan.tile_tokens) / plan.tile_tokens;
    const int64_t start = first * layer.out_features;
    Group group{layer, tier, plan, x + first * layer.in_features, residual ? residual + start : nullptr,
                y + start, count, scratch, n_chunks};
    const auto run = [&](void (*task)(void*, size_t), size_t n_tasks) {
      executor.run(executor.context, task, n_tasks, &group);
    };
    if (tier.prepare) run(prepare_task, tasks_of(round_up(count, tier.lanes), kPreparedTokens));
    run(dense_task, tasks_of(n_tiles * layer.n_blocks, 1));
    run(sparse_task, tasks_of(n_tiles * n_chunks, 1));
    if (residual || layer.norm_weight) run(normalize_task, tasks_of(count, kNormalizedTokens));
  }
}

}  // namespace dsformer
