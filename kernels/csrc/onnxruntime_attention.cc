// The ONNX Runtime side of Attention: its schema and checks.
#include <algorithm>

#include "attention.h"
#include "dispatch.h"
#include "onnxruntime_node.h"

namespace dsformer {
namespace {

enum Input : size_t { kQkv, kMask, kInputCount };

struct Work {
  const Attention& layer;
  const AttentionTier& tier;
  int64_t parts;  // of a text's queries
};

void attend_task(void* data, size_t task) {
  const Work& work = *static_cast<const Work*>(data);
  const auto i = static_cast<int64_t>(task);
  const int64_t first = i % work.parts * work.tier.queries, head = i / work.parts;
  work.tier.attend(work.layer, head / work.layer.n_heads, head % work.layer.n_heads, first,
                   std::min(work.tier.queries, work.layer.tokens - first));
}

class Kernel {
 public:
  Kernel(const OrtApi& api, const NodeReader& node, const std::string& what)
      : api_(api), what_(what), n_heads_(node.int_attribute("num_heads", 0)) {
    if (n_heads_ < 1) throw BadNode("attribute num_heads: expected 1 or more, got " + std::to_string(n_heads_));
    const Choice& chosen = choice();
    if (!chosen.tier) throw BadNode(chosen.message);
    const std::string precision = node.string_attribute("precision", "float32");
    if (precision != "float32" && precision != "bfloat16") {
      throw BadNode("attribute precision: expected float32 or bfloat16, got '" + precision + "'");
    }
    tier_ = chosen.tier->attention;
    if (precision == "float32" && tier_->exact) tier_ = tier_->exact;
  }

  const OrtApi& api() const { return api_; }
  const std::string& what() const { return what_; }

  void compute(OrtKernelContext* context) const {
    const Tensor qkv = read_tensor(api_, input_of(api_, context, kQkv));
    require_type("QKV", qkv, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
    const int64_t columns = qkv.shape.size() == 3 ? qkv.shape[2] : 0;
    require_shape("QKV", qkv, "[batch, sequence, 3 * width * " + std::to_string(n_heads_) + "], a head's width up to " +
                                  std::to_string(kMostWidth),
                  columns > 0 && columns % (3 * n_heads_) == 0 && columns / (3 * n_heads_) <= kMostWidth);
    Attention layer{qkv.shape[0], qkv.shape[1], n_heads_, columns / (3 * n_heads_),
                    static_cast<const float*>(qkv.data), nullptr, nullptr};
    if (const OrtValue* value = input_of(api_, context, kMask)) {
      const Tensor mask = read_tensor(api_, value);
      const Shape expected{layer.batch, layer.tokens};
      require_type("mask", mask, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32});
      require_shape("mask", mask, to_string(expected), mask.shape == expected);
      layer.mask = static_cast<const int32_t*>(mask.data);
    }
    layer.y = output_of(api_, context, {layer.batch, layer.tokens, layer.n_heads * layer.width});
    if (layer.batch == 0 || layer.tokens == 0) return;
    Work work{layer, *tier_, (layer.tokens + tier_->queries - 1) / tier_->queries};
    Pool pool{api_, context};
    Pool::run(&pool, attend_task, static_cast<size_t>(layer.batch * layer.n_heads * work.parts), &work);
  }

 private:
  const OrtApi& api_;
  const std::string what_;
  const int64_t n_heads_;
  const AttentionTier* tier_ = nullptr;
};

struct Op {
  static constexpr char kName[] = "Attention";
  static constexpr int kSinceVersion = 1;
  static constexpr size_t kInputCount = dsformer::kInputCount;

  static ONNXTensorElementDataType input_type(size_t index) {
    return index == kQkv ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  }
  static bool is_optional(size_t index) { return index == kMask; }

  // [batch, sequence, 3 · hidden] -> [batch, sequence, hidden]
  static void infer_shape(const OrtApi& api, OrtShapeInferContext* context) {
    InferredShape y = read_shape(api, context, kQkv);
    if (y.sizes.size() != 3 || y.sizes[2] < 0) return;  // unknown here; compute checks the real shapes
    y.sizes[2] /= 3;
    infer_output(api, context, y);
  }
};

}  // namespace

const OrtCustomOp& attention_op() {
  static const OrtCustomOp op = make_op<Op, Kernel>();
  return op;
}

}  // namespace dsformer
