#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/executor/static_model.h"
#include "runtime/graph/graph.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/package/manifest.h"
#include "runtime/rows/token_table.h"

namespace meki {

// What computes: the package's graphs on the CPU, or those that are compiled for a chip on its NPU.
enum class Provider { cpu, qnn };

std::string_view name_of(Provider provider);
// Throws std::invalid_argument.
Provider parse_provider(std::string_view name);

struct EngineOptions {
  std::filesystem::path onnxruntime;  // the ONNX Runtime shared library
  int threads = 0;                    // compute threads; 0: one per available core
  RomAccess rom_access = RomAccess::pread;
  std::optional<KvType> kv_type{};         // none: int8 on the CPU, float16 of compiled stages, which have no other
  bool memory = true;                      // false: the package's backbone without its memory
  std::chrono::microseconds rom_delay{0};  // added to every bundle read, to imitate slow storage
  std::filesystem::path profile{};         // as in GraphOptions
  Provider provider = Provider::cpu;
  std::filesystem::path qnn_library{};  // libonnxruntime_providers_qnn.so; with Provider::qnn
  std::string soc{};                    // the compiled chip, by its name in the manifest; empty: the only one there is
};

// An opened package: what all its sessions share. Immutable and thread-safe.
class Engine {
 public:
  // Throws PackageError if the package is unusable, std::invalid_argument for bad options, std::runtime_error if ONNX
  // Runtime cannot be loaded.
  static std::shared_ptr<const Engine> open(const std::filesystem::path& directory, const EngineOptions& options);

  // What `open` does at last, and tests do: one step of each kind, which finds what does not fit the manifest. If the
  // NPU does not take the memory that it shares, sessions have ordinary memory from here on. Throws PackageError.
  static std::shared_ptr<const Engine> tried(std::shared_ptr<Engine> engine);

  // From parts; `open` and tests use it. `rows` is what open_rows(manifest) gave: null exactly for a dense model.
  // Throws PackageError if the stages do not fit the manifest.
  Engine(Manifest manifest, std::shared_ptr<const RowSource> rows, const GraphLoader& load, int threads,
         KvType kv_type);
  // The same with Provider::qnn.
  Engine(Manifest manifest, std::shared_ptr<const RowSource> rows, StaticModel model, int threads);

  const Manifest& manifest() const { return manifest_; }
  const std::shared_ptr<const RowSource>& rows() const { return rows_; }
  const std::vector<Stage>& stages() const { return stages_; }
  // Names of the float32 [1, T, hidden] tensors that pass from stage to stage.
  const std::vector<std::string>& hidden_names() const { return hidden_names_; }
  // What runs with Provider::qnn, where there are no stages(); null on the CPU.
  const StaticModel* static_model() const { return static_model_ ? &*static_model_ : nullptr; }
  // The longest sequence that a session can hold, in tokens.
  size_t context() const { return static_model_ ? static_model_->context : manifest_.architecture.context; }
  int threads() const { return threads_; }
  KvType kv_type() const { return kv_type_; }

  Provider provider() const { return static_model_ ? Provider::qnn : Provider::cpu; }
  // Whether Qualcomm's simulator of the NPU computes: results as on the chip, speed is not.
  bool simulated() const { return static_model_ && static_model_->simulated; }
  // Whether sessions keep the KV cache in memory that they share with the NPU. If not, an NPU copies all of it each
  // step.
  bool shared_memory() const { return static_model_ && static_model_->shared_memory; }
  // The chip that runs; empty with Provider::cpu.
  std::string soc() const { return static_model_ ? static_model_->soc : std::string(); }

 private:
  Manifest manifest_;
  std::shared_ptr<const RowSource> rows_;
  std::vector<Stage> stages_;
  std::vector<std::string> hidden_names_;
  std::optional<StaticModel> static_model_;
  int threads_;
  KvType kv_type_;
};

}  // namespace meki
