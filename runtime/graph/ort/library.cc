#include "runtime/graph/ort/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace meki::ort {
namespace {

const ApiBase* load_base(const std::filesystem::path& path) {
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const char* reason = handle == nullptr ? ::dlerror() : nullptr;
  if (handle == nullptr) {
    throw std::runtime_error("cannot load ONNX Runtime from " + path.string() + ": " +
                             (reason != nullptr ? reason : "unknown reason") +
                             "; install the package onnxruntime >= 1.24");
  }
  using GetApiBase = const ApiBase* (*)();
  const auto get_base = reinterpret_cast<GetApiBase>(::dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error(path.string() + ": not an ONNX Runtime library (no OrtGetApiBase)");
  const ApiBase* base = get_base();
  if (base->GetApi(kApiVersion) == nullptr) {
    throw std::runtime_error(path.string() + ": ONNX Runtime " + base->GetVersionString() +
                             ", expected 1.24 or newer; upgrade the package onnxruntime");
  }
  return base;
}

}  // namespace

const Library& library_at(const std::filesystem::path& path) {
  static std::mutex mutex;
  static std::filesystem::path loaded;
  static const Library* library = nullptr;
  const std::lock_guard lock(mutex);
  if (library == nullptr) {
    const ApiBase* base = load_base(path);
    // From 1.29 on ONNX Runtime reports usage to its maker, unless this says otherwise; the thread that does it also
    // keeps forked children from ending.
    ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    // Only fatal errors are logged: all others are exceptions with the same text.
    auto made = std::make_unique<Library>(Library{Api(base->GetApi(kApiVersion)), base->GetVersionString()});
    made->api.check(made->api.CreateEnv(kLogFatal, "meki", &made->env));
    made->api.check(made->api.CreateCpuMemoryInfo(kDeviceAllocator, kMemoryDefault, &made->cpu));
    library = made.release();
    loaded = path;
  } else if (path != loaded) {
    throw std::runtime_error("ONNX Runtime is already loaded from " + loaded.string() + ", cannot load " +
                             path.string() + " as well; use one library a process");
  }
  return *library;
}

}  // namespace meki::ort
