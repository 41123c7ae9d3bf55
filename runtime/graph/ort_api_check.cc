// Checks graph/ort_api.h against the official header, at compile time: built only with -DMEKI_ORT_HEADER=<path>.

#include MEKI_ORT_HEADER

#include <cstddef>
#include <type_traits>

#include "graph/ort_api.h"

namespace {

// Our opaque types and enumerations stand for the official ones: parameter for parameter they have the same representation.
template <class T>
constexpr size_t kParameters = 0;
template <class R, class... P>
constexpr size_t kParameters<R (*)(P...)> = sizeof...(P);
#if __cpp_noexcept_function_type
template <class R, class... P>
constexpr size_t kParameters<R (*)(P...) noexcept> = sizeof...(P);
#endif

#define MEKI_ORT_CHECK(position, name, result, parameters)                                                        \
  static_assert(offsetof(OrtApi, name) == (position) * sizeof(void*), #name " is at another position");           \
  static_assert(kParameters<decltype(OrtApi::name)> == kParameters<result(*) parameters>, #name " takes other parameters");
MEKI_ORT_FUNCTIONS(MEKI_ORT_CHECK)
#undef MEKI_ORT_CHECK

static_assert(ORT_LOGGING_LEVEL_ERROR == static_cast<int>(meki::ort::kLogError));
static_assert(ORT_ENABLE_ALL == static_cast<int>(meki::ort::kOptimizeAll));
static_assert(OrtDeviceAllocator == static_cast<int>(meki::ort::kDeviceAllocator));
static_assert(OrtMemTypeDefault == static_cast<int>(meki::ort::kMemoryDefault));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == static_cast<int>(meki::ort::kFloat));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 == static_cast<int>(meki::ort::kInt32));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == static_cast<int>(meki::ort::kInt64));

}  // namespace
