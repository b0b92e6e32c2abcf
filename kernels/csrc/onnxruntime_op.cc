// The ONNX Runtime side of DSLinear: schema, checks, scratch and threads. The only file that knows ONNX Runtime.
//
// Everything that can be wrong with a node is found here, before any arithmetic, and said in a sentence with the
// node's name. Inside, errors are C++ exceptions; the callbacks at the end turn them into OrtStatus, so none crosses
// the C boundary. Scratch comes from ONNX Runtime's arena and threads from its pool: nothing is owned between calls.
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "ds_linear.h"
#include "ort_min_abi.h"

namespace dsformer {
namespace {

constexpr char kDomain[] = "dsformer";
constexpr char kOpType[] = "DSLinear";
constexpr int kSinceVersion = 1;

enum Input : size_t {
  kX, kDictionary, kIndices, kValues, kBias, kScales, kResidual, kNormWeight, kNormBias, kInputCount
};
constexpr const char* kInputNames[] = {"X",      "dictionary", "indices",     "values",   "bias",
                                       "scales", "residual",   "norm_weight", "norm_bias"};
bool is_optional(size_t input) { return input >= kBias; }
// The weights' own types are checked when the kernel is made; the others are float32 always.
bool is_float32(size_t input) { return input == kX || is_optional(input); }

constexpr size_t kScratchAlignment = 64;

constexpr char kNoScales[] = "scales: expected none, because only int16 weights have them";
constexpr char kNoConstantScales[] = "scales: expected a constant (an initializer of the graph), for int16 weights";
constexpr char kHalfANorm[] = "norm_weight and norm_bias: expected both as constants, or neither";

using Shape = std::vector<int64_t>;

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

std::string type_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return "int16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return "uint16";
    default: return "ONNX element type " + std::to_string(static_cast<int>(type));
  }
}

// A fault of the node or of its inputs, in words.
struct BadNode : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

bool succeeded(const OrtApi& api, OrtStatus* status) {
  if (!status) return true;
  api.ReleaseStatus(status);
  return false;
}

struct Tensor {
  ONNXTensorElementDataType type;
  Shape shape;
  void* data;

  int64_t size() const {
    int64_t n = 1;
    for (const int64_t dimension : shape) n *= dimension;
    return n;
  }
};

Tensor read_tensor(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, api.ReleaseTensorTypeAndShapeInfo);
  Tensor tensor;
  size_t rank = 0;
  check(api, api.GetTensorElementType(info.get(), &tensor.type));
  check(api, api.GetDimensionsCount(info.get(), &rank));
  tensor.shape.resize(rank);
  check(api, api.GetDimensions(info.get(), tensor.shape.data(), rank));
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

// ---- kernel creation: attributes and constant weights ----

class NodeReader {
 public:
  NodeReader(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::string name() const {
    size_t size = 0;
    if (!succeeded(api_, api_.KernelInfo_GetNodeName(info_, nullptr, &size)) || size <= 1) return "(unnamed)";
    std::string text(size, '\0');
    if (!succeeded(api_, api_.KernelInfo_GetNodeName(info_, text.data(), &size))) return "(unnamed)";
    text.resize(size - 1);
    return text;
  }

  std::string string_attribute(const char* attribute, const char* absent) const {
    size_t size = 0;
    if (!succeeded(api_, api_.KernelInfoGetAttribute_string(info_, attribute, nullptr, &size))) {
      require_absent(attribute, "a string");
      return absent;
    }
    std::string text(size, '\0');
    check(api_, api_.KernelInfoGetAttribute_string(info_, attribute, text.data(), &size));
    text.resize(std::strlen(text.c_str()));
    return text;
  }

  int64_t int_attribute(const char* attribute, int64_t absent) const {
    int64_t value = 0;
    if (succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, attribute, &value))) return value;
    require_absent(attribute, "an integer");
    return absent;
  }

  float float_attribute(const char* attribute, float absent) const {
    float value = 0;
    if (succeeded(api_, api_.KernelInfoGetAttribute_float(info_, attribute, &value))) return value;
    require_absent(attribute, "a float");
    return absent;
  }

  // False unless the input is there and a constant of the graph.
  bool constant(Input input, Tensor* tensor) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (!succeeded(api_, api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value))) return false;
    if (!is_constant || !value) return false;
    *tensor = read_tensor(api_, value);
    return true;
  }

 private:
  // The getters fail alike for "absent" and "of another type": tell the two apart.
  void require_absent(const char* attribute, const char* wanted) const {
    float number = 0;
    int64_t integer = 0;
    size_t size = 0;
    if (succeeded(api_, api_.KernelInfoGetAttribute_float(info_, attribute, &number)) ||
        succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, attribute, &integer)) ||
        succeeded(api_, api_.KernelInfoGetAttribute_string(info_, attribute, nullptr, &size))) {
      throw BadNode(std::string("attribute ") + attribute + ": expected " + wanted);
    }
  }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
};

void require_type(Input input, const Tensor& tensor, std::initializer_list<ONNXTensorElementDataType> allowed) {
  std::string expected;
  for (const ONNXTensorElementDataType type : allowed) {
    if (tensor.type == type) return;
    expected += (expected.empty() ? "" : " or ") + type_name(type);
  }
  throw BadNode(std::string(kInputNames[input]) + ": expected " + expected + ", got " + type_name(tensor.type));
}

void require_shape(Input input, const Tensor& tensor, const std::string& expected, bool as_expected) {
  if (as_expected) return;
  throw BadNode(std::string(kInputNames[input]) + ": expected shape " + expected + ", got " + to_string(tensor.shape));
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

// No atom may be longer than what keeps products in 16 bits.
void require_short_atoms(const Tensor& dictionary) {
  const int16_t* atom = static_cast<const int16_t*>(dictionary.data);
  const int64_t width = dictionary.shape[2], n_atoms = dictionary.size() / width;
  for (int64_t k = 0; k < n_atoms; ++k, atom += width) {
    int64_t square = 0;
    for (int64_t b = 0; b < width; ++b) square += int32_t{atom[b]} * atom[b];
    if (square <= kLongestAtom * kLongestAtom) continue;
    throw BadNode("dictionary: expected int16 atoms of norm " + std::to_string(kLongestAtom) + " at most, but atom " +
                  std::to_string(k % dictionary.shape[1]) + " of block " + std::to_string(k / dictionary.shape[1]) +
                  " is longer");
  }
}

// A number a row of the output.
const float* row_numbers(Input input, const Tensor& tensor, int64_t out_features) {
  require_type(input, tensor, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
  require_shape(input, tensor, to_string({out_features}), tensor.shape == Shape{out_features});
  return static_cast<const float*>(tensor.data);
}

// The same of a constant; null if there is none.
const float* constant_row_numbers(const NodeReader& node, Input input, int64_t out_features) {
  Tensor tensor;
  return node.constant(input, &tensor) ? row_numbers(input, tensor, out_features) : nullptr;
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
                ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16});
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
  layer.number = dictionary.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16     ? Number::int16
                 : dictionary.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? Number::float16
                                                                            : Number::float32;
  layer.wide = indices.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16;
  layer.dictionary = dictionary.data;
  layer.indices = indices.data;
  layer.values = values.data;
  layer.bias = nullptr;
  layer.scales = nullptr;
  if (layer.n_atoms > 65536) {
    throw BadNode("dictionary: expected at most 65536 atoms per block, got " + std::to_string(layer.n_atoms));
  }
  if (layer.wide) {
    require_below<uint16_t>(indices, layer.n_atoms);
  } else {
    require_below<uint8_t>(indices, layer.n_atoms);
  }
  if (layer.number == Number::int16) {
    require_short_atoms(dictionary);
    layer.scales = constant_row_numbers(node, kScales, layer.out_features);
    if (!layer.scales) throw BadNode(kNoConstantScales);
  } else if (Tensor unused; node.constant(kScales, &unused)) {
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
    OrtStatus* status = api.AllocatorAlloc(allocator_, floats * sizeof(float) + kScratchAlignment, &memory_);
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
    return reinterpret_cast<float*>((address + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment);
  }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

struct Pool {
  const OrtApi& api;
  const OrtKernelContext* context;

  static void run(void* pool, void (*body)(void*, size_t), size_t n_tasks, void* data) {
    const Pool& self = *static_cast<Pool*>(pool);
    check(self.api, self.api.KernelContext_ParallelFor(self.context, body, n_tasks, 0, data));
  }
};

class Kernel {
 public:
  Kernel(const OrtApi& api, const NodeReader& node) : api_(api), name_(node.name()), layer_(read_layer(node)) {
    constant_row_numbers(node, kBias, layer_.out_features);  // computed ones are checked at the call
    const Choice& chosen = choice();
    if (!chosen.tier) throw BadNode(chosen.message);
    tier_ = chosen.tier->ds_linear;
    check(api, api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_info_));
  }
  ~Kernel() { api_.ReleaseMemoryInfo(memory_info_); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const OrtApi& api() const { return api_; }
  const std::string& name() const { return name_; }

  void compute(OrtKernelContext* context) const {
    const Tensor x = read_tensor(api_, input(context, kX));
    require_type(kX, x, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
    require_shape(kX, x, "[..., " + std::to_string(layer_.in_features) + "]",
                  !x.shape.empty() && x.shape.back() == layer_.in_features);
    DsLinear layer = layer_;
    if (const OrtValue* bias = optional(context, kBias)) {
      layer.bias = row_numbers(kBias, read_tensor(api_, bias), layer.out_features);
    }
    if (!layer.scales && optional(context, kScales)) throw BadNode(kNoScales);
    if (!layer.norm_weight && (optional(context, kNormWeight) || optional(context, kNormBias))) throw BadNode(kHalfANorm);

    Shape y_shape = x.shape;
    y_shape.back() = layer.out_features;
    const float* residual = nullptr;
    if (const OrtValue* value = optional(context, kResidual)) {
      const Tensor tensor = read_tensor(api_, value);
      require_type(kResidual, tensor, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
      require_shape(kResidual, tensor, to_string(y_shape) + ", that of Y", tensor.shape == y_shape);
      residual = static_cast<const float*>(tensor.data);
    }
    OrtValue* y = nullptr;
    check(api_, api_.KernelContext_GetOutput(context, 0, y_shape.data(), y_shape.size(), &y));
    const int64_t tokens = x.size() / layer.in_features;
    if (tokens == 0) return;
    void* y_data = nullptr;
    check(api_, api_.GetTensorMutableData(y, &y_data));

    const DsLinearTier& tier = suited(layer, *tier_, tokens);
    const Plan plan = make_plan(layer, tier, tokens);
    const Scratch scratch(api_, context, memory_info_, static_cast<size_t>(plan.scratch_floats));
    Pool pool{api_, context};
    ds_linear(layer, tier, plan, static_cast<const float*>(x.data), residual, static_cast<float*>(y_data), tokens,
              scratch.floats(), {&pool, Pool::run});
  }

 private:
  const OrtValue* input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetInput(context, index, &value));
    return value;
  }

  // Null if the input is left out.
  const OrtValue* optional(const OrtKernelContext* context, size_t index) const {
    size_t n_inputs = 0;
    check(api_, api_.KernelContext_GetInputCount(context, &n_inputs));
    return index < n_inputs ? input(context, index) : nullptr;
  }

  const OrtApi& api_;
  const std::string name_;
  const DsLinear layer_;
  const DsLinearTier* tier_ = nullptr;
  OrtMemoryInfo* memory_info_ = nullptr;
};

// ---- shape inference: [..., N] -> [..., M], symbolic dimensions kept ----

struct InferredShape {
  ONNXTensorElementDataType type;
  Shape sizes;
  std::vector<const char*> symbols;
};

InferredShape read_shape(const OrtApi& api, const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  InferredShape shape;
  size_t rank = 0;
  check(api, api.GetTensorElementType(info, &shape.type));
  check(api, api.GetDimensionsCount(info, &rank));
  shape.sizes.resize(rank);
  shape.symbols.resize(rank, "");
  check(api, api.GetDimensions(info, shape.sizes.data(), rank));
  if (rank > 0) check(api, api.GetSymbolicDimensions(info, shape.symbols.data(), rank));
  return shape;
}

void infer_shape(const OrtApi& api, OrtShapeInferContext* context) {
  InferredShape y = read_shape(api, context, kX);
  const InferredShape values = read_shape(api, context, kValues);
  if (y.sizes.empty() || values.sizes.size() != 3) return;  // unknown here; Compute checks the real shapes
  y.sizes.back() = values.sizes[1];
  y.symbols.back() = values.symbols[1];
  for (size_t i = 0; i < y.sizes.size(); ++i) {
    if (y.sizes[i] < 0 && !*y.symbols[i]) return;  // a size with neither number nor name cannot be handed on
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api, api.CreateTensorTypeAndShapeInfo(&raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, api.ReleaseTensorTypeAndShapeInfo);
  check(api, api.SetTensorElementType(raw, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
  check(api, api.SetDimensions(raw, y.sizes.data(), y.sizes.size()));
  check(api, api.SetSymbolicDimensions(raw, y.symbols.data(), y.symbols.size()));
  check(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, raw));
}

// ---- the C boundary ----

// Runs `body` and turns what it throws into a status that names the node.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, const char* node, const Body& body) noexcept {
  OrtErrorCode code = ORT_RUNTIME_EXCEPTION;
  try {
    try {
      body();
      return nullptr;
    } catch (const BadNode& fault) {
      code = ORT_INVALID_ARGUMENT;
      return api.CreateStatus(code, (std::string(kOpType) + " node '" + node + "': " + fault.what()).c_str());
    } catch (const std::exception& fault) {
      return api.CreateStatus(code, (std::string(kOpType) + " node '" + node + "': " + fault.what()).c_str());
    }
  } catch (...) {
    return api.CreateStatus(code, "DSLinear failed, and there was no memory left to say why");
  }
}

// Shape inference carries no api pointer, so registration leaves it here: there is one ONNX Runtime in a process.
const OrtApi* registered_api = nullptr;

OrtStatus* create_kernel(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  const NodeReader node(*api, info);
  std::string name = "(unnamed)";
  OrtStatus* failed = guarded(*api, "", [&] { name = node.name(); });
  if (failed) return failed;
  return guarded(*api, name.c_str(), [&] { *kernel = new Kernel(*api, node); });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Kernel& self = *static_cast<const Kernel*>(kernel);
  return guarded(self.api(), self.name().c_str(), [&] { self.compute(context); });
}

OrtStatus* infer_output_shape(const OrtCustomOp*, OrtShapeInferContext* context) {
  return guarded(*registered_api, "(shape inference)", [&] { infer_shape(*registered_api, context); });
}

OrtCustomOp make_op() {
  OrtCustomOp op{};
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp*) { return kOpType; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) {
    // Undefined means any type here; the kernel's creation checks which.
    return is_float32(index) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return is_optional(index) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return kSinceVersion; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = infer_output_shape;
  return op;
}

// The domain and the op are never freed: sessions made with them may outlive any static object.
OrtCustomOpDomain* make_domain(const OrtApi& api) {
  static const OrtCustomOp op = make_op();
  OrtCustomOpDomain* domain = nullptr;
  check(api, api.CreateCustomOpDomain(kDomain, &domain));
  check(api, api.CustomOpDomain_Add(domain, &op));
  return domain;
}

}  // namespace
}  // namespace dsformer

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {
    // The first slots are as old as the table itself.
    return base->GetApi(1)->CreateStatus(
        ORT_FAIL, "libdsformer.so needs ONNX Runtime 1.17 or newer: install a newer onnxruntime");
  }
  return dsformer::guarded(*api, "(registration)", [&] {
    dsformer::registered_api = api;
    static OrtCustomOpDomain* const domain = dsformer::make_domain(*api);
    dsformer::check(*api, api->AddCustomOpDomain(options, domain));
  });
}
