// Batch-OMP over a whole weight matrix: prepares every block, then codes chunks of rows on plain threads.
//
// No OpenMP and no pool: a second runtime's workers would spin against the caller's (PyTorch's) on the same cores.
// Threads start and end within a call; results do not depend on their number.
#include "omp.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"

namespace dsformer {
namespace {

// Rows a task codes: about 0.1 ms of work, enough to hide the hand-over and small enough to balance.
constexpr int64_t kRowsPerTask = 128;

struct Problem {
  const float* weight;      // (M, N)
  const float* dictionary;  // (N/B, K, B)
  int32_t* indices;         // (N/B, M, S)
  float* values;            // (N/B, M, S)
  int64_t rows, columns, n_blocks, n_atoms, n_nonzero, bank_atoms, bank_limit;
  int threads;
};

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, FreeDeleter>;

Floats aligned_floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (!memory) throw std::bad_alloc();
  return Floats(static_cast<float*>(memory));
}

// Calls body(worker, task) for every task, on `workers` threads of which the caller is one.
template <typename Body>
void parallel_for(int64_t n_tasks, int workers, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t task; (task = next.fetch_add(1)) < n_tasks;) body(worker, task);
  };
  std::vector<std::thread> threads;
  for (int worker = 1; worker < std::min<int64_t>(workers, n_tasks); ++worker) {
    try {
      threads.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // the process may start no more threads: the ones there are do the work
    }
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
}

using RowsFunction = int64_t (*)(const OmpBlock&, const OmpRows&, float*);

class Coder {
 public:
  Coder(const Problem& problem, const OmpTier& tier)
      : p_(problem),
        tier_(tier),
        width_(problem.columns / problem.n_blocks),
        pitch_((problem.n_atoms + kOmpPad - 1) / kOmpPad * kOmpPad),
        atoms_t_(aligned_floats(problem.n_blocks * width_ * pitch_)),
        gram_(aligned_floats(problem.n_blocks * problem.n_atoms * pitch_)) {}

  // Writes a sentence into `error` and returns false when the input is unusable.
  bool run(RowsFunction function, char* error, size_t error_size) {
    parallel_for(p_.n_blocks, p_.threads, [&](int, int64_t i) {
      tier_.prepare(block(i), atoms_t_.get() + i * width_ * pitch_, gram_.get() + i * p_.n_atoms * pitch_);
    });
    if (!atoms_are_unit(error, error_size)) return false;

    const int64_t scratch = (tier_.scratch_floats(block(0), p_.n_nonzero) + 15) / 16 * 16;
    const Floats memory = aligned_floats(scratch * p_.threads);
    const int64_t chunks = (p_.rows + kRowsPerTask - 1) / kRowsPerTask;
    std::atomic<int64_t> bad{-1};
    parallel_for(p_.n_blocks * chunks, p_.threads, [&](int worker, int64_t task) {
      const int64_t i = task / chunks, first = task % chunks * kRowsPerTask;
      const int64_t r = function(block(i), rows(i, first), memory.get() + worker * scratch);
      if (r >= 0) bad = i * p_.rows + first + r;
    });
    if (bad < 0) return true;
    std::snprintf(error, error_size, "weight row %lld, block %lld: expected finite numbers, found NaN or infinity",
                  static_cast<long long>(bad % p_.rows), static_cast<long long>(bad / p_.rows));
    return false;
  }

 private:
  OmpBlock block(int64_t i) const {
    const float* atoms = p_.dictionary + i * p_.n_atoms * width_;
    return {p_.n_atoms, width_, pitch_, p_.bank_atoms, p_.bank_limit, atoms, atoms_t_.get() + i * width_ * pitch_,
            gram_.get() + i * p_.n_atoms * pitch_};
  }

  OmpRows rows(int64_t i, int64_t first) const {
    const int64_t offset = (i * p_.rows + first) * p_.n_nonzero;
    return {std::min(kRowsPerTask, p_.rows - first), p_.columns, p_.weight + first * p_.columns + i * width_,
            p_.n_nonzero,    p_.indices + offset, p_.values + offset};
  }

  // Matching pursuit compares correlations across atoms: that is meaningless unless their norms agree. 1e-3 lets
  // dictionaries through that were rounded to half precision.
  bool atoms_are_unit(char* error, size_t error_size) const {
    for (int64_t i = 0; i < p_.n_blocks; ++i) {
      for (int64_t k = 0; k < p_.n_atoms; ++k) {
        const float square = block(i).gram[k * pitch_ + k];
        if (std::abs(square - 1.0f) <= 2e-3f) continue;
        std::snprintf(error, error_size, "dictionary block %lld, atom %lld: expected norm 1, got %g",
                      static_cast<long long>(i), static_cast<long long>(k), std::sqrt(static_cast<double>(square)));
        return false;
      }
    }
    return true;
  }

  const Problem& p_;
  const OmpTier& tier_;
  const int64_t width_, pitch_;
  const Floats atoms_t_, gram_;
};

int run(const Problem& problem, RowsFunction OmpTier::*function, char* error, size_t error_size) {
  try {
    const Choice& chosen = choice();
    if (!chosen.tier) {
      std::snprintf(error, error_size, "%s", chosen.message);
      return 1;
    }
    const OmpTier& tier = *chosen.tier->omp;
    return Coder(problem, tier).run(tier.*function, error, error_size) ? 0 : 1;
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "batch-OMP failed: %s", exception.what());
    return 1;
  }
}

}  // namespace
}  // namespace dsformer

// weight (M, N), dictionary (N/B, K, B), indices and values (N/B, M, S), all row-major. The caller has checked the
// sizes: all positive, n_blocks divides N, S <= K, and S codes fit into the banks. Both return 0, or 1 with a sentence
// in `error`.
extern "C" __attribute__((visibility("default"))) int dsformer_batch_omp(
    const float* weight, const float* dictionary, int32_t* indices, float* values, int64_t rows, int64_t columns,
    int64_t n_blocks, int64_t n_atoms, int64_t n_nonzero, int64_t bank_atoms, int64_t bank_limit, int threads, char* error,
    size_t error_size) {
  return dsformer::run({weight, dictionary, indices, values, rows, columns, n_blocks, n_atoms, n_nonzero, bank_atoms,
                        bank_limit, threads},
                       &dsformer::OmpTier::code, error, error_size);
}

// Here indices is input, every one of them below K; banks do not matter.
extern "C" __attribute__((visibility("default"))) int dsformer_refit(
    const float* weight, const float* dictionary, int32_t* indices, float* values, int64_t rows, int64_t columns,
    int64_t n_blocks, int64_t n_atoms, int64_t n_nonzero, int64_t bank_atoms, int64_t bank_limit, int threads, char* error,
    size_t error_size) {
  return dsformer::run({weight, dictionary, indices, values, rows, columns, n_blocks, n_atoms, n_nonzero, bank_atoms,
                        bank_limit, threads},
                       &dsformer::OmpTier::refit, error, error_size);
}
