#pragma once

// The part of ONNX Runtime's C ABI that the runtime uses, declared by hand: no package of ours ships its headers.
// The ABI is a table of function pointers to which entries are only ever appended; the number of each entry here is its
// position. With -DMEKI_ORT_HEADER=<onnxruntime_c_api.h> CMake builds a check of this table against the official
// header.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace meki::ort {

struct Env;
struct Session;
struct SessionOptions;
struct Status;
struct MemoryInfo;
struct Value;
struct RunOptions;
struct Allocator;
struct IoBinding;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct TensorShape;
struct ShapeInference;
struct CustomOp;
struct EpDevice;
struct HardwareDevice;

// The API version asked for: that of ONNX Runtime 1.24, the oldest that the stages run on.
inline constexpr uint32_t kApiVersion = 24;

enum LoggingLevel : int { kLogFatal = 4 };
enum GraphOptimization : int { kOptimizeAll = 99 };
enum AllocatorType : int { kDeviceAllocator = 0 };
enum MemoryType : int { kMemoryDefault = 0 };
enum ElementCode : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kDouble = 11 };
enum ErrorCode : int { kFail = 1 };
enum HardwareType : int { kHardwareNpu = 2 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// position, name, result, parameters
#define MEKI_ORT_FUNCTIONS(F)                                                                                         \
  F(0, CreateStatus, Status*, (ErrorCode, const char* message))                                                       \
  F(2, GetErrorMessage, const char*, (const Status*))                                                                 \
  F(3, CreateEnv, Status*, (LoggingLevel, const char* log_id, Env**))                                                 \
  F(7, CreateSession, Status*, (const Env*, const char* path, const SessionOptions*, Session**))                      \
  F(10, CreateSessionOptions, Status*, (SessionOptions**))                                                            \
  F(14, EnableProfiling, Status*, (SessionOptions*, const char* prefix))                                              \
  F(23, SetSessionGraphOptimizationLevel, Status*, (SessionOptions*, GraphOptimization))                              \
  F(24, SetIntraOpNumThreads, Status*, (SessionOptions*, int))                                                        \
  F(26, CreateCustomOpDomain, Status*, (const char* domain, CustomOpDomain**))                                        \
  F(27, CustomOpDomain_Add, Status*, (CustomOpDomain*, const CustomOp*))                                              \
  F(28, AddCustomOpDomain, Status*, (SessionOptions*, CustomOpDomain*))                                               \
  F(30, SessionGetInputCount, Status*, (const Session*, size_t*))                                                     \
  F(31, SessionGetOutputCount, Status*, (const Session*, size_t*))                                                    \
  F(36, SessionGetInputName, Status*, (const Session*, size_t, Allocator*, char**))                                   \
  F(37, SessionGetOutputName, Status*, (const Session*, size_t, Allocator*, char**))                                  \
  F(49, CreateTensorWithDataAsOrtValue, Status*,                                                                      \
    (const MemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t rank, ElementCode, Value**))           \
  F(51, GetTensorMutableData, Status*, (Value*, void**))                                                              \
  F(60, GetTensorElementType, Status*, (const TensorShape*, ElementCode*))                                            \
  F(61, GetDimensionsCount, Status*, (const TensorShape*, size_t*))                                                   \
  F(62, GetDimensions, Status*, (const TensorShape*, int64_t* dimensions, size_t count))                              \
  F(65, GetTensorTypeAndShape, Status*, (const Value*, TensorShape**))                                                \
  F(68, CreateMemoryInfo, Status*, (const char* name, AllocatorType, int id, MemoryType, MemoryInfo**))               \
  F(69, CreateCpuMemoryInfo, Status*, (AllocatorType, MemoryType, MemoryInfo**))                                      \
  F(75, AllocatorAlloc, Status*, (Allocator*, size_t bytes, void**))                                                  \
  F(76, AllocatorFree, Status*, (Allocator*, void*))                                                                  \
  F(78, GetAllocatorWithDefaultOptions, Status*, (Allocator**))                                                       \
  F(85, KernelInfoGetAttribute_float, Status*, (const KernelInfo*, const char* name, float*))                         \
  F(86, KernelInfoGetAttribute_int64, Status*, (const KernelInfo*, const char* name, int64_t*))                       \
  F(90, KernelContext_GetInput, Status*, (const KernelContext*, size_t index, const Value**))                         \
  F(91, KernelContext_GetOutput, Status*, (KernelContext*, size_t index, const int64_t* shape, size_t rank, Value**)) \
  F(93, ReleaseStatus, void, (Status*))                                                                               \
  F(94, ReleaseMemoryInfo, void, (MemoryInfo*))                                                                       \
  F(95, ReleaseSession, void, (Session*))                                                                             \
  F(96, ReleaseValue, void, (Value*))                                                                                 \
  F(99, ReleaseTensorTypeAndShapeInfo, void, (TensorShape*))                                                          \
  F(100, ReleaseSessionOptions, void, (SessionOptions*))                                                              \
  F(101, ReleaseCustomOpDomain, void, (CustomOpDomain*))                                                              \
  F(110, SessionEndProfiling, Status*, (Session*, Allocator*, char** file))                                           \
  F(130, AddSessionConfigEntry, Status*, (SessionOptions*, const char* key, const char* value))                       \
  F(131, CreateAllocator, Status*, (const Session*, const MemoryInfo*, Allocator**))                                  \
  F(132, ReleaseAllocator, void, (Allocator*))                                                                        \
  F(133, RunWithBinding, Status*, (Session*, const RunOptions*, const IoBinding*))                                    \
  F(134, CreateIoBinding, Status*, (Session*, IoBinding**))                                                           \
  F(135, ReleaseIoBinding, void, (IoBinding*))                                                                        \
  F(136, BindInput, Status*, (IoBinding*, const char* name, const Value*))                                            \
  F(137, BindOutput, Status*, (IoBinding*, const char* name, const Value*))                                           \
  F(150, AddInitializer, Status*, (SessionOptions*, const char* name, const Value*))                                  \
  F(230, KernelInfo_GetInputCount, Status*, (const KernelInfo*, size_t*))                                             \
  F(231, KernelInfo_GetOutputCount, Status*, (const KernelInfo*, size_t*))                                            \
  F(232, KernelInfo_GetInputName, Status*, (const KernelInfo*, size_t index, char* name, size_t* size))               \
  F(249, KernelInfoGetConstantInput_tensor, Status*,                                                                  \
    (const KernelInfo*, size_t index, int* is_constant, const Value**))                                               \
  F(301, RegisterExecutionProviderLibrary, Status*, (Env*, const char* name, const char* path))                       \
  F(303, GetEpDevices, Status*, (const Env*, const EpDevice* const** devices, size_t* count))                         \
  F(304, SessionOptionsAppendExecutionProvider_V2, Status*,                                                           \
    (SessionOptions*, Env*, const EpDevice* const* devices, size_t device_count, const char* const* keys,             \
     const char* const* values, size_t option_count))                                                                 \
  F(307, HardwareDevice_Type, HardwareType, (const HardwareDevice*))                                                  \
  F(312, EpDevice_EpName, const char*, (const EpDevice*))                                                             \
  F(316, EpDevice_Device, const HardwareDevice*, (const EpDevice*))

struct Api {
#define MEKI_ORT_MEMBER(position, name, result, parameters) result(*name) parameters;
  MEKI_ORT_FUNCTIONS(MEKI_ORT_MEMBER)
#undef MEKI_ORT_MEMBER

  // Picks the functions out of the library's table.
  explicit Api(const void* table) {
    const auto* entries = static_cast<void* const*>(table);
#define MEKI_ORT_LOAD(position, name, result, parameters) \
  name = reinterpret_cast<result(*) parameters>(entries[position]);
    MEKI_ORT_FUNCTIONS(MEKI_ORT_LOAD)
#undef MEKI_ORT_LOAD
  }

  // Throws std::runtime_error with ONNX Runtime's message if `status` is one of failure.
  void check(Status* status) const {
    if (status == nullptr) return;
    const std::string message = GetErrorMessage(status);
    ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime: " + message);
  }
};

// The callbacks of an operator, in their order: result, name, parameters
#define MEKI_ORT_CALLBACKS(F)                                                                      \
  F(void*, CreateKernel, (const CustomOp*, const void* api, const KernelInfo*))                    \
  F(const char*, GetName, (const CustomOp*))                                                       \
  F(const char*, GetExecutionProviderType, (const CustomOp*))                                      \
  F(ElementCode, GetInputType, (const CustomOp*, size_t index))                                    \
  F(size_t, GetInputTypeCount, (const CustomOp*))                                                  \
  F(ElementCode, GetOutputType, (const CustomOp*, size_t index))                                   \
  F(size_t, GetOutputTypeCount, (const CustomOp*))                                                 \
  F(void, KernelCompute, (void* kernel, KernelContext*))                                           \
  F(void, KernelDestroy, (void* kernel))                                                           \
  F(Characteristic, GetInputCharacteristic, (const CustomOp*, size_t index))                       \
  F(Characteristic, GetOutputCharacteristic, (const CustomOp*, size_t index))                      \
  F(MemoryType, GetInputMemoryType, (const CustomOp*, size_t index))                               \
  F(int, GetVariadicInputMinArity, (const CustomOp*))                                              \
  F(int, GetVariadicInputHomogeneity, (const CustomOp*))                                           \
  F(int, GetVariadicOutputMinArity, (const CustomOp*))                                             \
  F(int, GetVariadicOutputHomogeneity, (const CustomOp*))                                          \
  F(Status*, CreateKernelV2, (const CustomOp*, const void* api, const KernelInfo*, void** kernel)) \
  F(Status*, KernelComputeV2, (void* kernel, KernelContext*))                                      \
  F(Status*, InferOutputShapeFn, (const CustomOp*, ShapeInference*))                               \
  F(int, GetStartVersion, (const CustomOp*))                                                       \
  F(int, GetEndVersion, (const CustomOp*))                                                         \
  F(size_t, GetMayInplace, (int** input_index, int** output_index))                                \
  F(void, ReleaseMayInplace, (int* input_index, int* output_index))                                \
  F(size_t, GetAliasMap, (int** input_index, int** output_index))                                  \
  F(void, ReleaseAliasMap, (int* input_index, int* output_index))

// An operator of our own, as ONNX Runtime sees it: a table of callbacks. `version` says which of them exist.
struct CustomOp {
  uint32_t version = kApiVersion;
#define MEKI_ORT_MEMBER(result, name, parameters) result(*name) parameters = nullptr;
  MEKI_ORT_CALLBACKS(MEKI_ORT_MEMBER)
#undef MEKI_ORT_MEMBER
};

// What the library exports as OrtGetApiBase().
struct ApiBase {
  const void* (*GetApi)(uint32_t version);  // null if the library is older than `version`
  const char* (*GetVersionString)();
};

}  // namespace meki::ort
