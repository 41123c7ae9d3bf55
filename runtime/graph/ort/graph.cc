// Stages that ONNX Runtime executes, and the loader for those on its CPU provider.

#include "runtime/graph/graph.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/base/file_guard.h"
#include "runtime/graph/ort/api.h"
#include "runtime/graph/ort/library.h"
#include "runtime/graph/ort/model_file.h"
#include "runtime/graph/ort/ops/operators.h"
#include "runtime/graph/ort/resident_weights.h"

namespace meki {
namespace {

using ort::Library;

struct TypeTraits {
  ort::ElementCode code;
  size_t bytes;
};

TypeTraits traits_of(ElementType type) {
  switch (type) {
    case ElementType::float32: return {ort::kFloat, 4};
    case ElementType::float16: return {ort::kFloat16, 2};
    case ElementType::uint8: return {ort::kUint8, 1};
    case ElementType::int32: return {ort::kInt32, 4};
    case ElementType::int64: return {ort::kInt64, 8};
  }
  throw std::logic_error("unknown element type");
}

// What a stage is called in messages, what helps against them, and the files that ONNX Runtime may have mapped for it.
struct Subject {
  std::filesystem::path path;
  std::string remedy;
  std::list<FileGuard> files{};

  // Runs `work`; what ONNX Runtime refuses becomes a PackageError that names the stage. One that names a file, if its
  // contents changed or went away meanwhile: nothing that was computed counts then.
  template <class Work>
  void guard(Work work) const {
    try {
      work();
    } catch (const std::runtime_error& error) {
      check_files();
      throw PackageError(path.string() + ": " + error.what() + "; " + remedy);
    }
    check_files();
  }

  void check_files() const {
    for (const FileGuard& file : files) file.check();
  }
};

class OrtBinding final : public Binding {
 public:
  // All that is passed outlives the binding, but for the names and shapes of the tensors.
  OrtBinding(const Library& library, const Subject& subject, ort::Session* session, const ort::MemoryInfo* shared,
             const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs)
      : library_(library),
        subject_(subject),
        session_(session),
        shared_(shared),
        binding_(nullptr, library.api.ReleaseIoBinding) {
    subject_.guard([&] {
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
    subject_.guard([this] { library_.api.check(library_.api.RunWithBinding(session_, nullptr, binding_.get())); });
  }

 private:
  // The binding keeps its own reference to the value, so this one may go.
  std::unique_ptr<ort::Value, void (*)(ort::Value*)> value_of(const Tensor& tensor) const {
    const auto [code, element_bytes] = traits_of(tensor.type);
    const int64_t elements = std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    ort::Value* value = nullptr;
    library_.api.check(library_.api.CreateTensorWithDataAsOrtValue(
        tensor.shared ? shared_ : library_.cpu, tensor.data, static_cast<size_t>(elements) * element_bytes,
        tensor.shape.data(), tensor.shape.size(), code, &value));
    return {value, library_.api.ReleaseValue};
  }

  const Library& library_;
  const Subject& subject_;
  ort::Session* session_;
  const ort::MemoryInfo* shared_;
  std::unique_ptr<ort::IoBinding, void (*)(ort::IoBinding*)> binding_;
};

class OrtGraph final : public Graph {
 public:
  OrtGraph(const Library& library, const std::filesystem::path& path, ort::Configure configure,
           ort::OperatorNames operators, const std::string& remedy, const std::filesystem::path& profile,
           const std::string& shared_memory)
      : library_(library),
        configure_(std::move(configure)),
        subject_{path, remedy},
        session_(nullptr, library.api.ReleaseSession),
        shared_(nullptr, library.api.ReleaseMemoryInfo),
        allocator_(nullptr, library.api.ReleaseAllocator) {
    const ort::ModelFile model = ort::check_model_file(path, operators, remedy);
    for (const std::string& file : model.files) subject_.files.emplace_back(path.parent_path() / file);
    const ort::Api& api = library_.api;
    ort::SessionOptions* options = nullptr;
    library_.api.check(api.CreateSessionOptions(&options));
    const std::unique_ptr<ort::SessionOptions, void (*)(ort::SessionOptions*)> owner(options,
                                                                                     api.ReleaseSessionOptions);
    configure_(options, model);
    if (!profile.empty()) {
      const std::string prefix = profile.string() + "." + subject_.path.stem().string();
      library_.api.check(api.EnableProfiling(options, prefix.c_str()));
    }
    ort::Session* session = nullptr;
    subject_.guard(
        [&] { library_.api.check(api.CreateSession(library_.env, subject_.path.c_str(), options, &session)); });
    session_.reset(session);
    inputs_ = names(api.SessionGetInputCount, api.SessionGetInputName);
    outputs_ = names(api.SessionGetOutputCount, api.SessionGetOutputName);
    if (!shared_memory.empty()) open_shared(shared_memory);
  }

  // In a forked child the threads that releasing the session would wait for are not there.
  ~OrtGraph() override {
    if (::getpid() != process_) static_cast<void>(session_.release());
  }
  OrtGraph(const OrtGraph&) = delete;
  OrtGraph& operator=(const OrtGraph&) = delete;

  const std::vector<std::string>& inputs() const override { return inputs_; }
  const std::vector<std::string>& outputs() const override { return outputs_; }

  std::unique_ptr<Binding> bind(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const override {
    return std::make_unique<OrtBinding>(library_, subject_, session_.get(), shared_.get(), inputs, outputs);
  }

  SharedMemory allocate_shared(size_t bytes) const override {
    void* memory = nullptr;
    if (allocator_ == nullptr || !done(library_.api.AllocatorAlloc(allocator_.get(), bytes, &memory))) return nullptr;
    std::memset(memory, 0, bytes);
    return {static_cast<std::byte*>(memory),
            [this](std::byte* data) { done(library_.api.AllocatorFree(allocator_.get(), data)); }};
  }

 private:
  // Whether a call succeeded that may fail.
  bool done(ort::Status* status) const {
    if (status != nullptr) library_.api.ReleaseStatus(status);
    return status == nullptr;
  }

  void open_shared(const std::string& name) {
    const ort::Api& api = library_.api;
    ort::MemoryInfo* info = nullptr;
    api.check(api.CreateMemoryInfo(name.c_str(), ort::kDeviceAllocator, 0, ort::kMemoryDefault, &info));
    shared_.reset(info);
    ort::Allocator* allocator = nullptr;
    if (done(api.CreateAllocator(session_.get(), info, &allocator))) allocator_.reset(allocator);
  }

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
  const ort::Configure configure_;  // outlives the session
  Subject subject_;
  std::unique_ptr<ort::Session, void (*)(ort::Session*)> session_;
  std::unique_ptr<ort::MemoryInfo, void (*)(ort::MemoryInfo*)> shared_;   // of shared memory; null: has none
  std::unique_ptr<ort::Allocator, void (*)(ort::Allocator*)> allocator_;  // of it; goes before the session
  const pid_t process_ = ::getpid();
  std::vector<std::string> inputs_;
  std::vector<std::string> outputs_;
};

}  // namespace

std::unique_ptr<Graph> ort::load_graph(const Library& library, const std::filesystem::path& path, Configure configure,
                                       OperatorNames operators, const std::string& remedy,
                                       const std::filesystem::path& profile, const std::string& shared_memory) {
  return std::make_unique<OrtGraph>(library, path, std::move(configure), operators, remedy, profile, shared_memory);
}

std::string onnxruntime_version(const std::filesystem::path& library) { return ort::library_at(library).version; }

GraphLoader onnxruntime_loader(const std::filesystem::path& library, const GraphOptions& options) {
  const Library& loaded = ort::library_at(library);
  const auto operators =
      std::make_shared<const OrtOperators>(loaded.api, options.kv_type, static_cast<size_t>(options.threads));
  const auto weights = std::make_shared<ort::ResidentWeights>(loaded);
  const auto configure = [&api = loaded.api, operators, weights, threads = options.graph_threads](
                             ort::SessionOptions* session, const ort::ModelFile& model) {
    api.check(api.SetIntraOpNumThreads(session, threads));
    api.check(api.SetSessionGraphOptimizationLevel(session, ort::kOptimizeAll));
    // What decode lives from has threads of its own (OrtOperators): these must not spin on the same cores.
    api.check(api.AddSessionConfigEntry(session, "session.intra_op.allow_spinning", "0"));
    operators->add_to(session);
    weights->add_to(session, model, operators->parallel());
  };
  return [&loaded, configure, profile = options.profile](const std::filesystem::path& path) {
    // The first session with operators of ours enters their domain in a table of the process, which ONNX Runtime does
    // not lock: until that is done one thread at a time.
    static std::mutex mutex;
    static std::atomic<bool> entered = false;
    std::unique_lock lock(mutex, std::defer_lock);
    if (!entered) lock.lock();
    auto graph = ort::load_graph(loaded, path, configure, ort::kCpuOperators,
                                 "the stage, its weights or the manifest are damaged, or memory is short: convert the "
                                 "model again",
                                 profile);
    entered = true;
    return graph;
  };
}

}  // namespace meki
