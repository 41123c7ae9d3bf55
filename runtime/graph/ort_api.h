#pragma once

// The part of ONNX Runtime's C ABI that the runtime uses, declared by hand: no package of ours ships its headers.
// The ABI is a table of function pointers to which entries are only ever appended; the number of each entry here is its
// position. With -DMEKI_ORT_HEADER=<onnxruntime_c_api.h> CMake builds a check of this table against the official
// header.

#include <cstddef>
#include <cstdint>

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

// The API version asked for: that of ONNX Runtime 1.24, the oldest that the stages run on.
inline constexpr uint32_t kApiVersion = 24;

enum LoggingLevel : int { kLogFatal = 4 };
enum GraphOptimization : int { kOptimizeAll = 99 };
enum AllocatorType : int { kDeviceAllocator = 0 };
enum MemoryType : int { kMemoryDefault = 0 };
enum ElementCode : int { kFloat = 1, kInt32 = 6, kInt64 = 7 };

// position, name, result, parameters
#define MEKI_ORT_FUNCTIONS(F)                                                                               \
  F(2, GetErrorMessage, const char*, (const Status*))                                                       \
  F(3, CreateEnv, Status*, (LoggingLevel, const char* log_id, Env**))                                       \
  F(7, CreateSession, Status*, (const Env*, const char* path, const SessionOptions*, Session**))            \
  F(10, CreateSessionOptions, Status*, (SessionOptions**))                                                  \
  F(23, SetSessionGraphOptimizationLevel, Status*, (SessionOptions*, GraphOptimization))                    \
  F(24, SetIntraOpNumThreads, Status*, (SessionOptions*, int))                                              \
  F(30, SessionGetInputCount, Status*, (const Session*, size_t*))                                           \
  F(31, SessionGetOutputCount, Status*, (const Session*, size_t*))                                          \
  F(36, SessionGetInputName, Status*, (const Session*, size_t, Allocator*, char**))                         \
  F(37, SessionGetOutputName, Status*, (const Session*, size_t, Allocator*, char**))                        \
  F(49, CreateTensorWithDataAsOrtValue, Status*,                                                            \
    (const MemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t rank, ElementCode, Value**)) \
  F(69, CreateCpuMemoryInfo, Status*, (AllocatorType, MemoryType, MemoryInfo**))                            \
  F(76, AllocatorFree, Status*, (Allocator*, void*))                                                        \
  F(78, GetAllocatorWithDefaultOptions, Status*, (Allocator**))                                             \
  F(93, ReleaseStatus, void, (Status*))                                                                     \
  F(95, ReleaseSession, void, (Session*))                                                                   \
  F(96, ReleaseValue, void, (Value*))                                                                       \
  F(100, ReleaseSessionOptions, void, (SessionOptions*))                                                    \
  F(130, AddSessionConfigEntry, Status*, (SessionOptions*, const char* key, const char* value))             \
  F(133, RunWithBinding, Status*, (Session*, const RunOptions*, const IoBinding*))                          \
  F(134, CreateIoBinding, Status*, (Session*, IoBinding**))                                                 \
  F(135, ReleaseIoBinding, void, (IoBinding*))                                                              \
  F(136, BindInput, Status*, (IoBinding*, const char* name, const Value*))                                  \
  F(137, BindOutput, Status*, (IoBinding*, const char* name, const Value*))

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
};

// What the library exports as OrtGetApiBase().
struct ApiBase {
  const void* (*GetApi)(uint32_t version);  // null if the library is older than `version`
  const char* (*GetVersionString)();
};

}  // namespace meki::ort
