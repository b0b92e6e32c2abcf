// Cuts a call into tiles, chunks and tasks. The arithmetic is in cpu/.
#include "ds_linear.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>

namespace dsformer {
namespace {

// Scratch of one group of tiles: 2 MiB. What the dense phase writes is still in L2, or near, for the sparse one, a large
// batch needs no memory in proportion, and threads wait for each other less often than with one tile at a time.
constexpr int64_t kGroupFloats = int64_t{1} << 19;
// Tasks a sparse phase should have, so that a pool of some threads balances.
constexpr int64_t kWantedTasks = 16;
// Least use of a row of products in a chunk of output rows, to pay for bringing it into L1; and the least rows.
constexpr int64_t kMinUses = 16;
constexpr int64_t kMinChunkRows = 64;
// Blocks in a pass of the sparse phase at least: with fewer, sums come and go more than products spared L1 by it.
constexpr int64_t kLeastPass = 4;

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

// Tokens of one task of the last phase: enough to be worth a task, few enough that even a short text makes several.
constexpr int64_t kNormalizedTokens = 8;

// Tiles that are in scratch together.
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
    const TileFloats sizes = tier.tile_floats(layer, pitch);
    float* products = scratch + i * plan.tile_floats;
    float* sums = products + sizes.products;
    float* prepared = sums + sizes.sums;
    return {x + first * layer.in_features, y + first * layer.out_features, count, pitch, products, sums, prepared,
            std::max(kLeastPass, fitting_tokens(layer, tier) / pitch)};
  }
};

void prepare_task(const Group& group, int64_t task) {
  const int64_t first = task * group.tier.prepared_tokens, tile_tokens = group.plan.tile_tokens;
  group.tier.prepare(group.layer, group.tile(first / tile_tokens), first % tile_tokens);
}

void dense_task(const Group& group, int64_t task) {
  group.tier.dense(group.layer, group.tile(task / group.layer.n_blocks), task % group.layer.n_blocks);
}

void sparse_task(const Group& group, int64_t task) {
  const int64_t first = task % group.n_chunks * group.plan.chunk_rows;
  group.tier.sparse(group.layer, group.tile(task / group.n_chunks), first,
                    std::min(group.plan.chunk_rows, group.layer.out_features - first));
}

void normalize_task(const Group& group, int64_t task) {
  const int64_t first = task * kNormalizedTokens, start = first * group.layer.out_features;
  group.tier.normalize(group.layer, group.residual ? group.residual + start : nullptr, group.y + start,
                       std::min(kNormalizedTokens, group.tokens - first));
}

// Tasks that need what the phase before them leaves, and nothing of each other.
struct Phase {
  void (*task)(const Group&, int64_t);
  int64_t n_tasks;
};

using Phases = std::array<Phase, 4>;

Phases phases_of(const Group& group) {
  const auto tasks = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
  const int64_t n_tiles = tasks(group.tokens, group.plan.tile_tokens);
  const bool normalized = group.residual || group.layer.norm_weight;
  const DsLinearTier& tier = group.tier;
  return {{{prepare_task, tier.prepare ? tasks(round_up(group.tokens, tier.lanes), tier.prepared_tokens) : 0},
           {dense_task, tier.dense ? n_tiles * group.layer.n_blocks : 0},
           {sparse_task, n_tiles * group.n_chunks},
           {normalize_task, normalized ? tasks(group.tokens, kNormalizedTokens) : 0}}};
}

// All phases of all groups as one list of tasks. Threads take them in order and wait, if they have to, for the end of
// the phase before: to let a thread sleep and wake it again for every phase costs more than many a phase does.
struct Work {
  const Group& whole;  // as if all tokens were one group
  alignas(64) std::atomic<int64_t> taken{0};
  alignas(64) std::atomic<int64_t> done{0};

  Group group(int64_t first) const {
    Group group = whole;
    const int64_t start = first * whole.layer.out_features;
    group.x += first * whole.layer.in_features;
    group.y += start;
    if (group.residual) group.residual += start;
    group.tokens = std::min(whole.plan.group_tiles * whole.plan.tile_tokens, whole.tokens - first);
    return group;
  }
};

// A phase's last tasks take microseconds; longer waits are for threads that have lost their core.
constexpr int kPauses = 2000;

void wait_for(const std::atomic<int64_t>& done, int64_t n_tasks) {
  for (int i = 0; done.load(std::memory_order_acquire) < n_tasks; ++i) {
#if defined(__x86_64__)
    if (i < kPauses) {
      __builtin_ia32_pause();
      continue;
    }
#endif
    std::this_thread::yield();
  }
}

// What every thread does, until no task is left. Whoever waits, waits for tasks that running threads have taken.
void work_off(void* data, size_t) {
  Work& work = *static_cast<Work*>(data);
  int64_t start = 0, task = work.taken++;
  for (int64_t first = 0; first < work.whole.tokens; first += work.group(first).tokens) {
    const Group group = work.group(first);
    for (const Phase& phase : phases_of(group)) {
      for (; task < start + phase.n_tasks; task = work.taken++) {
        wait_for(work.done, start);
        phase.task(group, task - start);
        work.done.fetch_add(1, std::memory_order_release);
      }
      start += phase.n_tasks;
    }
  }
}

}  // namespace

TileFloats float_tile(const DsLinear& layer, int64_t pitch) {
  return {layer.n_blocks * layer.n_atoms * pitch, layer.out_features * pitch, 0};
}

bool suits_all(const DsLinear&, int64_t) { return true; }

const DsLinearTier& suited(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens) {
  const DsLinearTier* chosen = &tier;
  while (!chosen->suits(layer, tokens)) chosen = chosen->plain;
  return *chosen;
}

Plan make_plan(const DsLinear& layer, const DsLinearTier& tier, int64_t tokens) {
  Plan plan;
  plan.tile_tokens = tile_tokens(layer, tier, tokens);
  const int64_t n_tiles = round_up(tokens, plan.tile_tokens) / plan.tile_tokens;
  const TileFloats sizes = tier.tile_floats(layer, plan.tile_tokens);
  plan.tile_floats = round_up(sizes.products + sizes.sums + sizes.prepared, 16);
  plan.group_tiles = std::clamp<int64_t>(kGroupFloats / plan.tile_floats, 1, n_tiles);
  plan.scratch_floats = plan.group_tiles * plan.tile_floats;

  const int64_t wanted_chunks = round_up(kWantedTasks, plan.group_tiles) / plan.group_tiles;
  const int64_t rows = (layer.out_features + wanted_chunks - 1) / wanted_chunks;
  const int64_t paying_rows = kMinUses * layer.n_atoms / layer.n_nonzero;
  plan.chunk_rows = round_up(std::max({rows, paying_rows, kMinChunkRows}), tier.step_rows);
  return plan;
}

void ds_linear(const DsLinear& layer, const DsLinearTier& tier, const Plan& plan, const float* x, const float* residual,
               float* y, int64_t tokens, float* scratch, const Executor& executor) {
  const int64_t n_chunks = round_up(layer.out_features, plan.chunk_rows) / plan.chunk_rows;
  const Group whole{layer, tier, plan, x, residual, y, tokens, scratch, n_chunks};
  Work work{whole};
  int64_t most = 1;  // threads that can have something to do
  for (const Phase& phase : phases_of(work.group(0))) most = std::max(most, phase.n_tasks);
  executor.run(executor.context, work_off, static_cast<size_t>(most), &work);
}

}  // namespace dsformer
