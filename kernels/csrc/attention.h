// The computation of the op Attention, free of ONNX Runtime: for each text and head,
//     y = softmax(q kᵀ / √width + mask) v
// with queries, keys and values side by side in one tensor, as DSLinear leaves them, and masked keys left out.
//
// Compiled under different instruction-set flags: plain structs only, no inline functions (see omp.h).
#pragma once
#include <cstddef>
#include <cstdint>

namespace dsformer {

// Numbers of a head at most: they lie on the stack, for as many queries as a task has.
constexpr int64_t kMostWidth = 256;
constexpr int64_t kMostQueries = 32;

struct Attention {
  int64_t batch;
  int64_t tokens;
  int64_t n_heads;
  int64_t width;        // of a head
  const float* qkv;     // (batch, tokens, 3, heads, width)
  const int32_t* mask;  // (batch, tokens), zero where a key is left out; or null
  float* y;             // (batch, tokens, heads, width)
};

struct AttentionTier {
  int64_t queries;  // of a task
  // Queries [first, first + tokens) of one text and head.
  void (*attend)(const Attention& layer, int64_t text, int64_t head, int64_t first, int64_t tokens);
  // In a tier that rounds to bfloat16, the one for nodes that do not allow it; else null.
  const AttentionTier* exact;
};

extern const AttentionTier attention_scalar;
#if defined(__x86_64__)
extern const AttentionTier attention_avx2;
extern const AttentionTier attention_avx512;
extern const AttentionTier attention_avx512bf16;
#endif

}  // namespace dsformer
