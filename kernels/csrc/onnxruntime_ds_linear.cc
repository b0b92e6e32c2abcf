// The ONNX Runtime side of DSLinear: its schema, checks and scratch.
#include <memory>
#include <new>

#include "dispatch.h"
#include "ds_linear.h"
#include "onnxruntime_node.h"

namespace dsformer {
namespace {

enum Input : size_t {
  kX, kDictionary, kIndices, kValues, kBias, kScales, kResidual, kNormWeight, kNormBias, kInputCount
};
constexpr const char* kInputNames[] = {"X",      "dictionary", "indices",     "values",   "bias",
                                       "scales", "residual",   "norm_weight", "norm_bias"};

constexpr size_t kAlignment = 64;

constexpr char kNoScales[] = "scales: expected none, because only integer weights have them";
constexpr char kNoConstantScales[] = "scales: expected a constant (an initializer of the graph), for integer weights";
constexpr char kHalfANorm[] = "norm_weight and norm_bias: expected both as constants, or neither";

// ---- kernel creation: attributes and constant weights ----

void require_type(Input input, const Tensor& tensor, std::initializer_list<ONNXTensorElementDataType> allowed) {
  dsformer::require_type(kInputNames[input], tensor, allowed);
}

void require_shape(Input input, const Tensor& tensor, const std::string& expected, bool as_expected) {
  dsformer::require_shape(kInputNames[input], tensor, expected, as_expected);
}

template <typename Index>
void require_below(const Tensor& indices, int64_t n_atoms) {
  const Index* data = static_cast<const Index*>(indices.data);
  Index largest = 0;
  const int64_t size = indices.size();
  for (int64_t i = 0; i < size; ++i) largest = data[i] > largest ? data[i] : largest;
  if (largest < n_atoms) return;
  throw BadNode("indices: expected numbers below K = " + std::to_string(n_atoms) + " (atoms per block), got " +
                std::to_string(largest));
}

// Bits of the norm of the longest atom, at least 1. In int16 it may have no more than what keeps products in 16 bits.
template <typename Number>
int atom_bits(const Tensor& dictionary) {
  const Number* atom = static_cast<const Number*>(dictionary.data);
  const int64_t width = dictionary.shape[2], n_atoms = dictionary.size() / width;
  int bits = 1;
  for (int64_t k = 0; k < n_atoms; ++k, atom += width) {
    int64_t square = 0;
    for (int64_t b = 0; b < width; ++b) square += int32_t{atom[b]} * atom[b];
    while (square > int64_t{1} << 2 * bits) ++bits;
    if (sizeof(Number) == 1 || bits <= kAtomBits) continue;
    throw BadNode("dictionary: expected int16 atoms of norm " + std::to_string(1 << kAtomBits) +
                  " at most, but atom " + std::to_string(k % dictionary.shape[1]) + " of block " +
                  std::to_string(k / dictionary.shape[1]) + " is longer");
  }
  return bits;
}

// A number a row of the output.
const float* row_numbers(Input input, const Tensor& tensor, int64_t out_features) {
  require_type(input, tensor, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
  require_shape(input, tensor, to_string({out_features}), tensor.shape == Shape{out_features});
  return static_cast<const float*>(tensor.data);
}

// The same of a constant; null if there is none, or one without elements, which stands for none.
const float* constant_row_numbers(const NodeReader& node, Input input, int64_t out_features) {
  Tensor tensor;
  return node.constant(input, &tensor) && tensor.size() > 0 ? row_numbers(input, tensor, out_features) : nullptr;
}

DsLinear read_layer(const NodeReader& node) {
  Tensor dictionary, indices, values;
  for (const auto& [input, tensor] : {std::pair{kDictionary, &dictionary}, {kIndices, &indices}, {kValues, &values}}) {
    if (!node.constant(input, tensor)) {
      throw BadNode(std::string(kInputNames[input]) + ": expected a constant (an initializer of the graph)");
    }
  }
  require_type(kDictionary, dictionary,
               {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8});
  require_type(kValues, values, {dictionary.type});
  require_type(kIndices, indices, {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16});
  require_shape(kDictionary, dictionary, "[N/B, K, B], none of them 0", dictionary.shape.size() == 3 && dictionary.size() > 0);
  const Shape& d = dictionary.shape;
  require_shape(kValues, values, "[" + std::to_string(d[0]) + ", M, S], none of them 0",
                values.shape.size() == 3 && values.shape[0] == d[0] && values.size() > 0);
  require_shape(kIndices, indices, to_string(values.shape) + ", that of values", indices.shape == values.shape);

  DsLinear layer;
  layer.n_blocks = d[0];
  layer.n_atoms = d[1];
  layer.width = d[2];
  layer.in_features = d[0] * d[2];
  layer.out_features = values.shape[1];
  layer.n_nonzero = values.shape[2];
  layer.number = dictionary.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8      ? Number::int8
                 : dictionary.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16   ? Number::int16
                 : dictionary.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? Number::float16
                                                                            : Number::float32;
  layer.wide = indices.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16;
  layer.dictionary = dictionary.data;
  layer.indices = indices.data;
  layer.values = values.data;
  layer.bias = nullptr;
  layer.scales = nullptr;
  layer.packed = nullptr;
  layer.atom_bits = 0;
  if (layer.n_atoms > 65536) {
    throw BadNode("dictionary: expected at most 65536 atoms per block, got " + std::to_string(layer.n_atoms));
  }
  if (layer.wide) {
    require_below<uint16_t>(indices, layer.n_atoms);
  } else {
    require_below<uint8_t>(indices, layer.n_atoms);
  }
  if (layer.number == Number::int16 || layer.number == Number::int8) {
    const bool is_int16 = layer.number == Number::int16;
    const int bits = is_int16 ? atom_bits<int16_t>(dictionary) : atom_bits<int8_t>(dictionary);
    layer.atom_bits = is_int16 ? kAtomBits : bits;  // rule 2 of int16 counts on the full number
    layer.scales = constant_row_numbers(node, kScales, layer.out_features);
    if (!layer.scales) throw BadNode(kNoConstantScales);
  } else if (Tensor scales; node.constant(kScales, &scales) && scales.size() > 0) {
    throw BadNode(kNoScales);
  }
  layer.norm_weight = constant_row_numbers(node, kNormWeight, layer.out_features);
  layer.norm_bias = constant_row_numbers(node, kNormBias, layer.out_features);
  if (!layer.norm_weight != !layer.norm_bias) throw BadNode(kHalfANorm);
  layer.norm_epsilon = node.float_attribute("norm_epsilon", 1e-5f);
  if (!(layer.norm_epsilon >= 0)) {
    throw BadNode("attribute norm_epsilon: expected 0 or more, got " + std::to_string(layer.norm_epsilon));
  }

  const std::string activation = node.string_attribute("activation", "none");
  if (activation != "none" && activation != "gelu") {
    throw BadNode("attribute activation: expected none or gelu, got '" + activation + "'");
  }
  layer.gelu = activation == "gelu";
  const int64_t row_group = node.int_attribute("row_group", 1);
  if (row_group != 1) {
    throw BadNode("attribute row_group: expected 1 (rows that share indices are not supported), got " +
                  std::to_string(row_group));
  }
  return layer;
}

// ---- computing ----

// Scratch from ONNX Runtime's arena, given back at the end of the call.
class Scratch {
 public:
  Scratch(const OrtApi& api, OrtKernelContext* context, const OrtMemoryInfo* memory_info, size_t floats) : api_(api) {
    check(api, api.KernelContext_GetAllocator(context, memory_info, &allocator_));
    OrtStatus* status = api.AllocatorAlloc(allocator_, floats * sizeof(float) + kAlignment, &memory_);
    if (status || !memory_) {
      api.ReleaseAllocator(allocator_);
      check(api, status);
      throw std::bad_alloc();
    }
  }
  ~Scratch() {
    succeeded(api_, api_.AllocatorFree(allocator_, memory_));
    api_.ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* floats() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

// Memory of a kernel's own, for packed weights.
class Memory {
 public:
  Allocator allocator() {
    return {this, [](void* memory, size_t bytes) { return static_cast<Memory*>(memory)->allocate(bytes); }};
  }

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };

  void* allocate(size_t bytes) {
    memory_.reset(::operator new(bytes, std::align_val_t{kAlignment}));
    return memory_.get();
  }

  std::unique_ptr<void, Free> memory_;
};

class Kernel {
 public:
  Kernel(const OrtApi& api, const NodeReader& node, const std::string& what)
      : api_(api), what_(what), layer_(read_layer(node)) {
    constant_row_numbers(node, kBias, layer_.out_features);  // computed ones are checked at the call
    const Choice& chosen = choice();
    if (!chosen.tier) throw BadNode(chosen.message);
    tier_ = chosen.tier->ds_linear;
    if (tier_->pack && tier_->suits(layer_, 1)) layer_.packed = tier_->pack(layer_, packed_.allocator());
    check(api, api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_info_));
  }
  ~Kernel() { api_.ReleaseMemoryInfo(memory_info_); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const OrtApi& api() const { return api_; }
  const std::string& what() const { return what_; }

  void compute(OrtKernelContext* context) const {
    const Tensor x = read_tensor(api_, input_of(api_, context, kX));
    require_type(kX, x, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
    require_shape(kX, x, "[..., " + std::to_string(layer_.in_features) + "]",
                  !x.shape.empty() && x.shape.back() == layer_.in_features);
    DsLinear layer = layer_;
    Tensor tensor;
    if (given(context, kBias, &tensor)) layer.bias = row_numbers(kBias, tensor, layer.out_features);
    if (!layer.scales && given(context, kScales, &tensor)) throw BadNode(kNoScales);
    if (!layer.norm_weight && (given(context, kNormWeight, &tensor) || given(context, kNormBias, &tensor))) {
      throw BadNode(kHalfANorm);
    }

    Shape y_shape = x.shape;
    y_shape.back() = layer.out_features;
    const float* residual = nullptr;
    if (given(context, kResidual, &tensor)) {
      require_type(kResidual, tensor, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
      require_shape(kResidual, tensor, to_string(y_shape) + ", that of Y", tensor.shape == y_shape);
      residual = static_cast<const float*>(tensor.data);
    }
    float* y = output_of(api_, context, y_shape);
    const int64_t tokens = x.size() / layer.in_features;
    if (tokens == 0) return;

    const DsLinearTier& tier = suited(layer, *tier_, tokens);
    const Plan plan = make_plan(layer, tier, tokens);
    const Scratch scratch(api_, context, memory_info_, static_cast<size_t>(plan.scratch_floats));
    Pool pool{api_, context};
    ds_linear(layer, tier, plan, static_cast<const float*>(x.data), residual, y, tokens,
              scratch.floats(), {&pool, Pool::run});
  }

 private:
  // False if the optional input is left out, or has no elements, which stands for that.
  bool given(const OrtKernelContext* context, Input input, Tensor* tensor) const {
    const OrtValue* value = input_of(api_, context, input);
    if (!value) return false;
    *tensor = read_tensor(api_, value);
    return tensor->size() > 0;
  }

  const OrtApi& api_;
  const std::string what_;
  DsLinear layer_;
  const DsLinearTier* tier_ = nullptr;
  Memory packed_;
  OrtMemoryInfo* memory_info_ = nullptr;
};

struct Op {
  static constexpr char kName[] = "DSLinear";
  static constexpr int kSinceVersion = 1;
  static constexpr size_t kInputCount = dsformer::kInputCount;

  // Undefined means any type here; the kernel's creation checks which.
  static ONNXTensorElementDataType input_type(size_t index) {
    const bool is_float32 = index == kX || is_optional(index);
    return is_float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  static bool is_optional(size_t index) { return index >= kBias; }

  // [..., N] -> [..., M]
  static void infer_shape(const OrtApi& api, OrtShapeInferContext* context) {
    InferredShape y = read_shape(api, context, kX);
    const InferredShape values = read_shape(api, context, kValues);
    if (y.sizes.empty() || values.sizes.size() != 3) return;  // unknown here; compute checks the real shapes
    y.sizes.back() = values.sizes[1];
    y.symbols.back() = values.symbols[1];
    infer_output(api, context, y);
  }
};

}  // namespace

const OrtCustomOp& ds_linear_op() {
  static const OrtCustomOp op = make_op<Op, Kernel>();
  return op;
}

}  // namespace dsformer
