// Attention for any CPU: plain loops, a query at a time.
#include <cmath>
#include <limits>

#include "../attention.h"

namespace dsformer {
namespace {

// A query's scores are computed twice rather than kept: there may be any number of keys.
void attend(const Attention& layer, int64_t text, int64_t head, int64_t first, int64_t tokens) {
  const int64_t width = layer.width, hidden = layer.n_heads * width, pitch = 3 * hidden;
  const float* queries = layer.qkv + text * layer.tokens * pitch + head * width;
  const float* keys = queries + hidden;
  const float* values = keys + hidden;
  const int32_t* mask = layer.mask ? layer.mask + text * layer.tokens : nullptr;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int64_t t = first; t < first + tokens; ++t) {
    const auto score = [&](int64_t k) {
      float sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += queries[t * pitch + i] * keys[k * pitch + i];
      return sum * scale;
    };
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < layer.tokens; ++k) {
      if (!mask || mask[k]) largest = std::fmax(largest, score(k));
    }
    float out[kMostWidth] = {}, sum = 0;
    for (int64_t k = 0; k < layer.tokens; ++k) {
      if (mask && !mask[k]) continue;
      const float e = std::exp(score(k) - largest);
      sum += e;
      for (int64_t i = 0; i < width; ++i) out[i] += e * values[k * pitch + i];
    }
    float* y = layer.y + (text * layer.tokens + t) * hidden + head * width;
    for (int64_t i = 0; i < width; ++i) y[i] = out[i] / std::fmax(sum, 1e-30f);
  }
}

}  // namespace

extern const AttentionTier attention_scalar = {kMostQueries, attend, nullptr};

}  // namespace dsformer
