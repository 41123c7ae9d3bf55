#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/kernels/kv_cache.h"

namespace meki {

enum class ElementType { float32, float16, uint8, int32, int64 };

// A named view of memory that a graph reads or writes. The memory outlives the binding it is given to.
struct Tensor {
  std::string name;
  ElementType type = ElementType::float32;
  std::vector<int64_t> shape;
  void* data = nullptr;
  bool shared = false;  // `data` is a SharedMemory
};

// Memory for one tensor that a graph's device works on in place, while it copies all other memory at every run. It goes
// after the bindings to it and before the graph that gave it.
using SharedMemory = std::unique_ptr<std::byte, std::function<void(std::byte*)>>;

// A graph together with the memory of its inputs and outputs. Use from one thread at a time.
class Binding {
 public:
  virtual ~Binding() = default;
  // Runs the graph once. Throws PackageError with the reason.
  virtual void run() = 0;
};

// A loaded stage of a model. Immutable and thread-safe.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual const std::vector<std::string>& inputs() const = 0;
  virtual const std::vector<std::string>& outputs() const = 0;
  // Binds all inputs and outputs (views of memory with the shapes of one step). Throws PackageError.
  // The graph must outlive the binding.
  virtual std::unique_ptr<Binding> bind(const std::vector<Tensor>& inputs,
                                        const std::vector<Tensor>& outputs) const = 0;
  // That many bytes, zeroed, for bindings of this graph and of all others of its loader. Null if there are none: a
  // graph on the CPU needs none, and a device may have no more.
  virtual SharedMemory allocate_shared(size_t) const { return nullptr; }
};

// How a stage is loaded: the seam between the engine and what executes graphs.
using GraphLoader = std::function<std::unique_ptr<Graph>(const std::filesystem::path&)>;

struct GraphOptions {
  int threads = 1;                  // of our own operators
  int graph_threads = 1;            // of all others
  KvType kv_type = KvType::int8;    // how attention stores keys and values
  std::filesystem::path profile{};  // not empty: when a stage goes, it leaves a trace in a file that begins so
};

// Loads stages with the ONNX Runtime library at `library` on its CPU provider. The library stays loaded until the
// process ends. Throws std::runtime_error if it cannot be loaded or is too old; the loader throws PackageError for a
// file that ONNX Runtime refuses.
GraphLoader onnxruntime_loader(const std::filesystem::path& library, const GraphOptions& options);

// The version of the ONNX Runtime library at `library`, such as "1.24.0", which is loaded as above.
std::string onnxruntime_version(const std::filesystem::path& library);

}  // namespace meki
