// Compares csrc/ort_min_abi.h with an official onnxruntime_c_api.h, version 17 or newer, at compile time. Both headers
// define the same names, so ours is included in a namespace: the layouts are compared, not the types.
#include <cstddef>
#include <cstdint>

namespace ours {
#include "ort_min_abi.h"
}  // namespace ours

#include <onnxruntime_c_api.h>

static_assert(ORT_API_VERSION >= 17, "the header must be of ONNX Runtime 1.17 or newer");

#define SAME(member, slot)                                                                              \
  static_assert(offsetof(OrtApi, member) == (slot) * sizeof(void*), #member " moved");                  \
  static_assert(offsetof(ours::OrtApi, member) == offsetof(OrtApi, member), #member " differs")
SAME(CreateStatus, 0);
SAME(GetErrorMessage, 2);
SAME(CreateCustomOpDomain, 26);
SAME(CustomOpDomain_Add, 27);
SAME(AddCustomOpDomain, 28);
SAME(GetTensorMutableData, 51);
SAME(CreateTensorTypeAndShapeInfo, 57);
SAME(SetTensorElementType, 58);
SAME(SetDimensions, 59);
SAME(GetTensorElementType, 60);
SAME(GetDimensionsCount, 61);
SAME(GetDimensions, 62);
SAME(GetSymbolicDimensions, 63);
SAME(GetTensorTypeAndShape, 65);
SAME(CreateCpuMemoryInfo, 69);
SAME(AllocatorAlloc, 75);
SAME(AllocatorFree, 76);
SAME(KernelInfoGetAttribute_float, 85);
SAME(KernelInfoGetAttribute_int64, 86);
SAME(KernelInfoGetAttribute_string, 87);
SAME(KernelContext_GetInputCount, 88);
SAME(KernelContext_GetInput, 90);
SAME(KernelContext_GetOutput, 91);
SAME(ReleaseStatus, 93);
SAME(ReleaseMemoryInfo, 94);
SAME(ReleaseTensorTypeAndShapeInfo, 99);
SAME(ReleaseAllocator, 132);
SAME(KernelInfo_GetInputCount, 230);
SAME(KernelInfo_GetNodeName, 244);
SAME(KernelInfoGetConstantInput_tensor, 249);
SAME(KernelContext_GetAllocator, 253);
SAME(ShapeInferContext_GetInputCount, 267);
SAME(ShapeInferContext_GetInputTypeShape, 268);
SAME(ShapeInferContext_SetOutputTypeShape, 270);
SAME(SetSymbolicDimensions, 271);
SAME(KernelContext_ParallelFor, 274);

#define FIELD(member, slot)                                                                             \
  static_assert(offsetof(OrtCustomOp, member) == (slot) * sizeof(void*), #member " moved");             \
  static_assert(offsetof(ours::OrtCustomOp, member) == offsetof(OrtCustomOp, member), #member " differs")
static_assert(offsetof(OrtCustomOp, version) == 0 && sizeof(OrtCustomOp::version) == 4, "version differs");
FIELD(CreateKernel, 1);
FIELD(GetName, 2);
FIELD(GetExecutionProviderType, 3);
FIELD(GetInputType, 4);
FIELD(GetInputTypeCount, 5);
FIELD(GetOutputType, 6);
FIELD(GetOutputTypeCount, 7);
FIELD(KernelCompute, 8);
FIELD(KernelDestroy, 9);
FIELD(GetInputCharacteristic, 10);
FIELD(GetOutputCharacteristic, 11);
FIELD(GetInputMemoryType, 12);
FIELD(GetVariadicInputMinArity, 13);
FIELD(GetVariadicInputHomogeneity, 14);
FIELD(GetVariadicOutputMinArity, 15);
FIELD(GetVariadicOutputHomogeneity, 16);
FIELD(CreateKernelV2, 17);
FIELD(KernelComputeV2, 18);
FIELD(InferOutputShapeFn, 19);
FIELD(GetStartVersion, 20);
FIELD(GetEndVersion, 21);

static_assert(offsetof(OrtApiBase, GetApi) == 0 && offsetof(OrtApiBase, GetVersionString) == sizeof(void*),
              "OrtApiBase differs");

#define VALUE(name) static_assert(static_cast<int>(ours::name) == static_cast<int>(name), #name " differs")
VALUE(ORT_FAIL);
VALUE(ORT_INVALID_ARGUMENT);
VALUE(ORT_RUNTIME_EXCEPTION);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
VALUE(INPUT_OUTPUT_REQUIRED);
VALUE(INPUT_OUTPUT_OPTIONAL);
VALUE(OrtArenaAllocator);
VALUE(OrtMemTypeDefault);
