#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "runtime/graph/graph.h"
#include "runtime/graph/ort/api.h"
#include "runtime/graph/ort/model_file.h"

namespace meki::ort {

// ONNX Runtime with its function table and its one environment.
struct Library {
  Api api;
  std::string version;
  Env* env = nullptr;
  MemoryInfo* cpu = nullptr;
};

// Loads it once; it is never unloaded, as its threads and static state do not survive a dlclose. Throws
// std::runtime_error if it cannot be loaded, is too old, or another one is loaded already. Thread-safe.
const Library& library_at(const std::filesystem::path& path);

// Sets what a provider needs for the session of a stage. Kept as long as the stage: it may own what the session uses.
using Configure = std::function<void(SessionOptions*, const ModelFile&)>;

// A stage from a file, of `operators` alone (check_model_file). `remedy` ends the message of a PackageError. With a
// `profile`, the stage leaves a trace in a file whose name begins so. `shared_memory` is the provider's name of memory
// that its device shares; empty: none.
std::unique_ptr<Graph> load_graph(const Library& library, const std::filesystem::path& path, Configure configure,
                                  OperatorNames operators, const std::string& remedy,
                                  const std::filesystem::path& profile, const std::string& shared_memory = {});

}  // namespace meki::ort
