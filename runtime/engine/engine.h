#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "kernels/kv_cache.h"
#include "package/manifest.h"
#include "rom/rom.h"

namespace meki {

struct EngineOptions {
  std::filesystem::path onnxruntime;  // the ONNX Runtime shared library
  int threads = 0;                    // compute threads; 0: one per available core
  RomAccess rom_access = RomAccess::pread;
  KvType kv_type = KvType::int8;
  bool memory = true;                      // false: the package's backbone without its memory
  std::chrono::microseconds rom_delay{0};  // added to every bundle read, to imitate slow storage
  std::filesystem::path profile{};         // as in GraphOptions
};

// A stage of the model, ready to be bound.
struct Stage {
  std::unique_ptr<Graph> graph;
  std::optional<LayerRange> rows;  // memory rows that it takes
};

// An opened package: what all its sessions share. Immutable and thread-safe.
class Engine {
 public:
  // Throws PackageError if the package is unusable, std::invalid_argument for bad options, std::runtime_error if ONNX
  // Runtime cannot be loaded.
  static std::shared_ptr<const Engine> open(const std::filesystem::path& directory, const EngineOptions& options);

  // From parts; `open` and tests use it. `rom` is what open_rom(manifest) gave: null exactly for a dense model. Throws
  // PackageError if the stages do not fit the manifest.
  Engine(Manifest manifest, std::shared_ptr<const Rom> rom, const GraphLoader& load, int threads, KvType kv_type);

  const Manifest& manifest() const { return manifest_; }
  const std::shared_ptr<const Rom>& rom() const { return rom_; }
  const std::vector<Stage>& stages() const { return stages_; }
  // Names of the float32 [1, T, hidden] tensors that pass from stage to stage.
  const std::vector<std::string>& hidden_names() const { return hidden_names_; }
  int threads() const { return threads_; }
  KvType kv_type() const { return kv_type_; }

 private:
  Manifest manifest_;
  std::shared_ptr<const Rom> rom_;
  std::vector<Stage> stages_;
  std::vector<std::string> hidden_names_;
  int threads_;
  KvType kv_type_;
};

// Opens a package's ROM and checks it against the manifest; null for a dense model. Throws PackageError.
std::shared_ptr<const Rom> open_rom(const Manifest& manifest, RomAccess access, std::chrono::microseconds delay = {});

}  // namespace meki
