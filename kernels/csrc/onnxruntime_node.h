// What the ops share on the ONNX Runtime side: tensors, attributes, threads, shape inference, errors.
//
// Everything that can be wrong with a node is found before any arithmetic, and said in a sentence with the node's name.
// Inside, errors are C++ exceptions; `guarded` turns them into OrtStatus, so none crosses the C boundary. Scratch comes
// from ONNX Runtime's arena and threads from its pool: nothing is owned between calls.
#pragma once
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_min_abi.h"

namespace dsformer {

using Shape = std::vector<int64_t>;

inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string type_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return "int16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return "uint16";
    default: return "ONNX element type " + std::to_string(static_cast<int>(type));
  }
}

// A fault of the node or of its inputs, in words.
struct BadNode : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

inline bool succeeded(const OrtApi& api, OrtStatus* status) {
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

inline Tensor read_tensor(const OrtApi& api, const OrtValue* value) {
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

inline void require_type(const char* name, const Tensor& tensor, std::initializer_list<ONNXTensorElementDataType> allowed) {
  std::string expected;
  for (const ONNXTensorElementDataType type : allowed) {
    if (tensor.type == type) return;
    expected += (expected.empty() ? "" : " or ") + type_name(type);
  }
  throw BadNode(std::string(name) + ": expected " + expected + ", got " + type_name(tensor.type));
}

inline void require_shape(const char* name, const Tensor& tensor, const std::string& expected, bool as_expected) {
  if (as_expected) return;
  throw BadNode(std::string(name) + ": expected shape " + expected + ", got " + to_string(tensor.shape));
}

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
  bool constant(size_t input, Tensor* tensor) const {
    size_t n_inputs = 0;  // ONNX Runtime 1.17 looks beyond its list for an input that was left out at the end
    check(api_, api_.KernelInfo_GetInputCount(info_, &n_inputs));
    if (input >= n_inputs) return false;
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

// An input of a call; null if it is left out.
inline const OrtValue* input_of(const OrtApi& api, const OrtKernelContext* context, size_t index) {
  size_t n_inputs = 0;
  check(api, api.KernelContext_GetInputCount(context, &n_inputs));
  if (index >= n_inputs) return nullptr;
  const OrtValue* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  return value;
}

// The only output of a call, float32 of this shape.
inline float* output_of(const OrtApi& api, OrtKernelContext* context, const Shape& shape) {
  OrtValue* value = nullptr;
  void* data = nullptr;
  check(api, api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
  check(api, api.GetTensorMutableData(value, &data));
  return static_cast<float*>(data);
}

struct Pool {
  const OrtApi& api;
  const OrtKernelContext* context;

  static void run(void* pool, void (*body)(void*, size_t), size_t n_tasks, void* data) {
    const Pool& self = *static_cast<Pool*>(pool);
    check(self.api, self.api.KernelContext_ParallelFor(self.context, body, n_tasks, 0, data));
  }
};

// ---- shape inference, symbolic dimensions kept ----

struct InferredShape {
  ONNXTensorElementDataType type;
  Shape sizes;
  std::vector<const char*> symbols;
};

inline InferredShape read_shape(const OrtApi& api, const OrtShapeInferContext* context, size_t index) {
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

// Nothing is inferred if a size has neither number nor name: it cannot be handed on.
inline void infer_output(const OrtApi& api, OrtShapeInferContext* context, InferredShape y) {
  for (size_t i = 0; i < y.sizes.size(); ++i) {
    if (y.sizes[i] < 0 && !*y.symbols[i]) return;
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

// Runs `body` and turns what it throws into a status that says in what.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, const std::string& what, const Body& body) noexcept {
  OrtErrorCode code = ORT_RUNTIME_EXCEPTION;
  try {
    try {
      body();
      return nullptr;
    } catch (const BadNode& fault) {
      code = ORT_INVALID_ARGUMENT;
      return api.CreateStatus(code, (what + ": " + fault.what()).c_str());
    } catch (const std::exception& fault) {
      return api.CreateStatus(code, (what + ": " + fault.what()).c_str());
    }
  } catch (...) {
    return api.CreateStatus(code, "a dsformer op failed, and there was no memory left to say why");
  }
}

// Shape inference carries no api pointer, so registration leaves it here: there is one ONNX Runtime in a process.
inline const OrtApi* registered_api = nullptr;

// The parts of an op that do not depend on which. Kernel: made from (api, reader of the node); has api(), what(), and
// compute(context). Op: kName, kInputCount, kSinceVersion, input_type(index), is_optional(index),
// infer_shape(api, context).
template <typename Op, typename Kernel>
OrtCustomOp make_op() {
  OrtCustomOp op{};
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp*) -> const char* { return Op::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Op::kInputCount; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return Op::input_type(index); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return Op::is_optional(index) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) -> int { return Op::kSinceVersion; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    const NodeReader node(*api, info);
    std::string what = Op::kName;
    OrtStatus* failed = guarded(*api, what, [&] { what += " node '" + node.name() + "'"; });
    if (failed) return failed;
    return guarded(*api, what, [&] { *kernel = new Kernel(*api, node, what); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api(), self.what(), [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatus* {
    const std::string what = std::string("shape inference of ") + Op::kName;
    return guarded(*registered_api, what, [&] { Op::infer_shape(*registered_api, context); });
  };
  return op;
}

// The ops of the library; what they point to lives as long as the process.
const OrtCustomOp& ds_linear_op();
const OrtCustomOp& attention_op();

}  // namespace dsformer
