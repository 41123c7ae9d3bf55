// Checks graph/ort_api.h against the official header, at compile time: built only with -DMEKI_ORT_HEADER=<path>.

#include MEKI_ORT_HEADER

#include <cstddef>
#include <type_traits>

#include "graph/ort_api.h"

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
using LoggingLevel = OrtLoggingLevel;
using GraphOptimization = GraphOptimizationLevel;
using AllocatorType = OrtAllocatorType;
using MemoryType = OrtMemType;
using ElementCode = ONNXTensorElementDataType;

#define MEKI_ORT_CHECK(position, name, result, parameters)                                              \
  static_assert(offsetof(OrtApi, name) == (position) * sizeof(void*), #name " is at another position"); \
  static_assert(std::is_convertible_v<decltype(OrtApi::name), result(*) parameters>, #name " has another signature");
MEKI_ORT_FUNCTIONS(MEKI_ORT_CHECK)
#undef MEKI_ORT_CHECK

static_assert(ORT_LOGGING_LEVEL_FATAL == static_cast<int>(meki::ort::kLogFatal));
static_assert(ORT_ENABLE_ALL == static_cast<int>(meki::ort::kOptimizeAll));
static_assert(OrtDeviceAllocator == static_cast<int>(meki::ort::kDeviceAllocator));
static_assert(OrtMemTypeDefault == static_cast<int>(meki::ort::kMemoryDefault));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == static_cast<int>(meki::ort::kFloat));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 == static_cast<int>(meki::ort::kInt32));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == static_cast<int>(meki::ort::kInt64));

}  // namespace official
