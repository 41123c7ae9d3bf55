// Checks graph/ort/api.h against the official header, at compile time: built only with -DMEKI_ORT_HEADER=<path>.

#include MEKI_ORT_HEADER

#include <cstddef>
#include <type_traits>

#include "runtime/graph/ort/api.h"

namespace official {

// The names of ort_api.h with the official types behind them, so that its table can be read with either.
using Env = OrtEnv;
using Session = OrtSession;
using SessionOptions = OrtSessionOptions;
using Status = OrtStatus;
using MemoryInfo = OrtMemoryInfo;
using Value = OrtValue;
using RunOptions = OrtRunOptions;
using Allocator = OrtAllocator;
using IoBinding = OrtIoBinding;
using CustomOpDomain = OrtCustomOpDomain;
using KernelInfo = OrtKernelInfo;
using KernelContext = OrtKernelContext;
using TensorShape = OrtTensorTypeAndShapeInfo;
using CustomOp = OrtCustomOp;
using ErrorCode = OrtErrorCode;
using LoggingLevel = OrtLoggingLevel;
using GraphOptimization = GraphOptimizationLevel;
using AllocatorType = OrtAllocatorType;
using MemoryType = OrtMemType;
using EpDevice = OrtEpDevice;
using HardwareDevice = OrtHardwareDevice;
using HardwareType = OrtHardwareDeviceType;
using ElementCode = ONNXTensorElementDataType;

#define MEKI_ORT_CHECK(position, name, result, parameters)                                              \
  static_assert(offsetof(OrtApi, name) == (position) * sizeof(void*), #name " is at another position"); \
  static_assert(                                                                                        \
      requires(const OrtApi& api, result(*function) parameters) { function = api.name; },               \
      #name " has another signature");
MEKI_ORT_FUNCTIONS(MEKI_ORT_CHECK)
#undef MEKI_ORT_CHECK

// The callbacks of an operator: the same names at the same places.
#define MEKI_ORT_CHECK_CALLBACK(result, name, parameters) \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(meki::ort::CustomOp, name));
MEKI_ORT_CALLBACKS(MEKI_ORT_CHECK_CALLBACK)
#undef MEKI_ORT_CHECK_CALLBACK

static_assert(ORT_LOGGING_LEVEL_FATAL == static_cast<int>(meki::ort::kLogFatal));
static_assert(ORT_ENABLE_ALL == static_cast<int>(meki::ort::kOptimizeAll));
static_assert(OrtDeviceAllocator == static_cast<int>(meki::ort::kDeviceAllocator));
static_assert(OrtMemTypeDefault == static_cast<int>(meki::ort::kMemoryDefault));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED == static_cast<int>(meki::ort::kAny));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == static_cast<int>(meki::ort::kFloat));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == static_cast<int>(meki::ort::kFloat16));
static_assert(OrtHardwareDeviceType_NPU == static_cast<int>(meki::ort::kHardwareNpu));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 == static_cast<int>(meki::ort::kInt32));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == static_cast<int>(meki::ort::kInt64));

static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 == static_cast<int>(meki::ort::kUint8));
static_assert(ORT_FAIL == static_cast<int>(meki::ort::kFail));
static_assert(INPUT_OUTPUT_REQUIRED == static_cast<int>(meki::ort::kRequired));
static_assert(INPUT_OUTPUT_OPTIONAL == static_cast<int>(meki::ort::kOptional));

}  // namespace official
