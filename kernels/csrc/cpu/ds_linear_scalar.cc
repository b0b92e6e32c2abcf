// The tier for any CPU: plain loops in the same order as the vector tiers, readable first.
#include <cmath>
#include <cstring>

#include "../ds_linear.h"

namespace dsformer {
namespace {

constexpr int64_t kLanes = 16;

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormals, in units of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t exponent_bits = exponent == 0x1f ? 0xff : exponent + (127 - 15);
  const uint32_t bits = sign | exponent_bits << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float read_number(const void* numbers, Number number, int64_t i) {
  switch (number) {
    case Number::int8: return static_cast<const int8_t*>(numbers)[i];
    case Number::int16: return static_cast<const int16_t*>(numbers)[i];
    case Number::float16: return half_to_float(static_cast<const uint16_t*>(numbers)[i]);
    default: return static_cast<const float*>(numbers)[i];
  }
}

int64_t read_index(const void* numbers, bool wide, int64_t i) {
  return wide ? static_cast<const uint16_t*>(numbers)[i] : static_cast<const uint8_t*>(numbers)[i];
}

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }

void add_scaled(float* __restrict sum, float scale, const float* __restrict row, int64_t n) {
  for (int64_t t = 0; t < n; ++t) sum[t] += scale * row[t];
}

void dense(const DsLinear& layer, const Tile& tile, int64_t block) {
  const int64_t first_atom = block * layer.n_atoms;
  float* products = static_cast<float*>(tile.products) + first_atom * tile.pitch;
  std::memset(products, 0, layer.n_atoms * tile.pitch * sizeof(float));
  for (int64_t b = 0; b < layer.width; ++b) {
    float column[kMaxTileTokens] = {};
    for (int64_t t = 0; t < tile.tokens; ++t) column[t] = tile.x[t * layer.in_features + block * layer.width + b];
    for (int64_t k = 0; k < layer.n_atoms; ++k) {
      const float atom = read_number(layer.dictionary, layer.number, (first_atom + k) * layer.width + b);
      add_scaled(products + k * tile.pitch, atom, column, tile.pitch);
    }
  }
}

void sparse(const DsLinear& layer, const Tile& tile, int64_t first, int64_t count) {
  for (int64_t m = first; m < first + count; ++m) {
    float sum[kMaxTileTokens] = {};
    for (int64_t block = 0; block < layer.n_blocks; ++block) {
      const float* products = static_cast<const float*>(tile.products) + block * layer.n_atoms * tile.pitch;
      const int64_t row = (block * layer.out_features + m) * layer.n_nonzero;
      for (int64_t s = row; s < row + layer.n_nonzero; ++s) {
        add_scaled(sum, read_number(layer.values, layer.number, s),
                   products + read_index(layer.indices, layer.wide, s) * tile.pitch, tile.pitch);
      }
    }
    const float scale = layer.scales ? layer.scales[m] : 1.0f, bias = layer.bias ? layer.bias[m] : 0.0f;
    for (int64_t t = 0; t < tile.tokens; ++t) {
      const float y = sum[t] * scale + bias;
      tile.y[t * layer.out_features + m] = layer.gelu ? gelu(y) : y;
    }
  }
}

void normalize(const DsLinear& layer, const float* residual, float* y, int64_t tokens) {
  const int64_t n = layer.out_features;
  for (int64_t t = 0; t < tokens; ++t, y += n) {
    if (residual) add_scaled(y, 1.0f, residual + t * n, n);
    if (!layer.norm_weight) continue;
    double sum = 0, square = 0;
    for (int64_t m = 0; m < n; ++m) sum += y[m];
    const double mean = sum / static_cast<double>(n);
    for (int64_t m = 0; m < n; ++m) square += (y[m] - mean) * (y[m] - mean);
    const double scale = 1 / std::sqrt(square / static_cast<double>(n) + layer.norm_epsilon);
    for (int64_t m = 0; m < n; ++m) {
      y[m] = static_cast<float>((y[m] - mean) * scale) * layer.norm_weight[m] + layer.norm_bias[m];
    }
  }
}

}  // namespace

extern const DsLinearTier ds_linear_scalar = {
    kLanes,  kMinTileTokens, kMaxTileTokens, kStepRows, kL1Share, sizeof(float), float_tile, suits_all,
    nullptr, nullptr,        0,              nullptr,   dense,    sparse,        normalize};

}  // namespace dsformer
