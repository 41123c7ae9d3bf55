// With ort_ops.cc the only place that knows ONNX Runtime.

#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ort_api.h"
#include "graph/ort_ops.h"

namespace meki {
namespace {

// The library with its function table and its one environment.
struct Library {
  ort::Api api;
  ort::Env* env = nullptr;
  ort::MemoryInfo* cpu = nullptr;
};

const void* load_api(const std::filesystem::path& path) {
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const char* reason = handle == nullptr ? ::dlerror() : nullptr;
  if (handle == nullptr) {
    throw std::runtime_error("cannot load ONNX Runtime from " + path.string() + ": " +
                             (reason != nullptr ? reason : "unknown reason") +
                             "; install the package onnxruntime >= 1.24");
  }
  using GetApiBase = const ort::ApiBase* (*)();
  const auto get_base = reinterpret_cast<GetApiBase>(::dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error(path.string() + ": not an ONNX Runtime library (no OrtGetApiBase)");
  const ort::ApiBase* base = get_base();
  const void* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    throw std::runtime_error(path.string() + ": ONNX Runtime " + base->GetVersionString() +
                             ", expected 1.24 or newer; upgrade the package onnxruntime");
  }
  return api;
}

// Loaded once and never unloaded: its threads and static state do not survive a dlclose.
const Library& library_at(const std::filesystem::path& path) {
  static std::mutex mutex;
  static std::filesystem::path loaded;
  static const Library* library = nullptr;
  const std::lock_guard lock(mutex);
  if (library == nullptr) {
    // Only fatal errors are logged: all others are exceptions with the same text.
    auto made = std::make_unique<Library>(Library{ort::Api(load_api(path))});
    made->api.check(made->api.CreateEnv(ort::kLogFatal, "meki", &made->env));
    made->api.check(made->api.CreateCpuMemoryInfo(ort::kDeviceAllocator, ort::kMemoryDefault, &made->cpu));
    library = made.release();
    loaded = path;
  } else if (path != loaded) {
    throw std::runtime_error("ONNX Runtime is already loaded from " + loaded.string() + ", cannot load " +
                             path.string() + " as well; use one library a process");
  }
  return *library;
}

struct TypeTraits {
  ort::ElementCode code;
  size_t bytes;
};

TypeTraits traits_of(ElementType type) {
  switch (type) {
    case ElementType::float32: return {ort::kFloat, 4};
    case ElementType::uint8: return {ort::kUint8, 1};
    case ElementType::int32: return {ort::kInt32, 4};
    case ElementType::int64: return {ort::kInt64, 8};
  }
  throw std::logic_error("unknown element type");
}

// Runs `work`; what ONNX Runtime refuses becomes a PackageError that names the stage.
template <class Work>
void for_stage(const std::filesystem::path& path, Work work) {
  try {
    work();
  } catch (const std::runtime_error& error) {
    throw PackageError(
        path.string() + ": " + error.what() +
        "; the stage, its weights or the manifest are damaged, or memory is short: convert the model again");
  }
}

class OrtBinding final : public Binding {
 public:
  // `path` names the stage in messages and outlives the binding, as `library` and `session` do.
  OrtBinding(const Library& library, const std::filesystem::path& path, ort::Session* session,
             const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs)
      : library_(library), path_(path), session_(session), binding_(nullptr, library.api.ReleaseIoBinding) {
    for_stage(path_, [&] {
      ort::IoBinding* binding = nullptr;
      library_.api.check(library_.api.CreateIoBinding(session_, &binding));
      binding_.reset(binding);
      for (const Tensor& tensor : inputs) {
        library_.api.check(library_.api.BindInput(binding, tensor.name.c_str(), value_of(tensor).get()));
      }
      for (const Tensor& tensor : outputs) {
        library_.api.check(library_.api.BindOutput(binding, tensor.name.c_str(), value_of(tensor).get()));
      }
    });
  }

  void run() override {
    for_stage(path_, [this] { library_.api.check(library_.api.RunWithBinding(session_, nullptr, binding_.get())); });
  }

 private:
  // The binding keeps its own reference to the value, so this one may go.
  std::unique_ptr<ort::Value, void (*)(ort::Value*)> value_of(const Tensor& tensor) const {
    const auto [code, element_bytes] = traits_of(tensor.type);
    const int64_t elements = std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    ort::Value* value = nullptr;
    library_.api.check(library_.api.CreateTensorWithDataAsOrtValue(
        library_.cpu, tensor.data, static_cast<size_t>(elements) * element_bytes, tensor.shape.data(),
        tensor.shape.size(), code, &value));
    return {value, library_.api.ReleaseValue};
  }

  const Library& library_;
  const std::filesystem::path& path_;
  ort::Session* session_;
  std::unique_ptr<ort::IoBinding, void (*)(ort::IoBinding*)> binding_;
};

class OrtGraph final : public Graph {
 public:
  OrtGraph(const Library& library, std::shared_ptr<const OrtOperators> operators, const std::filesystem::path& path,
           const GraphOptions& settings)
      : library_(library),
        operators_(std::move(operators)),
        path_(path),
        session_(nullptr, library.api.ReleaseSession) {
    const ort::Api& api = library_.api;
    ort::SessionOptions* options = nullptr;
    library_.api.check(api.CreateSessionOptions(&options));
    const std::unique_ptr<ort::SessionOptions, void (*)(ort::SessionOptions*)> owner(options,
                                                                                     api.ReleaseSessionOptions);
    library_.api.check(api.SetIntraOpNumThreads(options, settings.threads));
    library_.api.check(api.SetSessionGraphOptimizationLevel(options, ort::kOptimizeAll));
    // What decode lives from has threads of its own (OrtOperators): these must not spin on the same cores.
    library_.api.check(api.AddSessionConfigEntry(options, "session.intra_op.allow_spinning", "0"));
    operators_->add_to(options);
    if (!settings.profile.empty()) {
      const std::string prefix = settings.profile.string() + "." + path.stem().string();
      library_.api.check(api.EnableProfiling(options, prefix.c_str()));
    }
    ort::Session* session = nullptr;
    for_stage(path_, [&] { library_.api.check(api.CreateSession(library_.env, path_.c_str(), options, &session)); });
    session_.reset(session);
    inputs_ = names(api.SessionGetInputCount, api.SessionGetInputName);
    outputs_ = names(api.SessionGetOutputCount, api.SessionGetOutputName);
  }

  const std::vector<std::string>& inputs() const override { return inputs_; }
  const std::vector<std::string>& outputs() const override { return outputs_; }

  std::unique_ptr<Binding> bind(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const override {
    return std::make_unique<OrtBinding>(library_, path_, session_.get(), inputs, outputs);
  }

 private:
  template <class Count, class Name>
  std::vector<std::string> names(Count get_count, Name get_name) const {
    ort::Allocator* allocator = nullptr;
    library_.api.check(library_.api.GetAllocatorWithDefaultOptions(&allocator));
    size_t count = 0;
    library_.api.check(get_count(session_.get(), &count));
    std::vector<std::string> names;
    for (size_t index = 0; index < count; ++index) {
      char* name = nullptr;
      library_.api.check(get_name(session_.get(), index, allocator, &name));
      names.emplace_back(name);
      library_.api.check(library_.api.AllocatorFree(allocator, name));
    }
    return names;
  }

  const Library& library_;
  const std::shared_ptr<const OrtOperators> operators_;
  const std::filesystem::path path_;
  std::unique_ptr<ort::Session, void (*)(ort::Session*)> session_;
  std::vector<std::string> inputs_;
  std::vector<std::string> outputs_;
};

}  // namespace

GraphLoader onnxruntime_loader(const std::filesystem::path& library, const GraphOptions& options) {
  const Library& loaded = library_at(library);
  auto operators =
      std::make_shared<const OrtOperators>(loaded.api, options.kv_type, static_cast<size_t>(options.threads));
  return [&loaded, operators, options](const std::filesystem::path& path) -> std::unique_ptr<Graph> {
    return std::make_unique<OrtGraph>(loaded, operators, path, options);
  };
}

}  // namespace meki
