#pragma once

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "runtime/executor/backend.h"
#include "runtime/rows/row_source.h"
#include "runtime/rows/token_table.h"

namespace meki {

struct EngineOptions {
  std::filesystem::path onnxruntime;  // the ONNX Runtime shared library
  int threads = 0;                    // compute threads, at most affinity_cpus(); 0: available_cpus() (base/cpus.h)
  RomAccess rom_access = RomAccess::pread;
  std::optional<KvType> kv_type{};         // none: int8 on the CPU, float16 of compiled stages, which have no other
  bool memory = true;                      // false: the package's backbone without its memory
  size_t row_cache = size_t{16} << 20;     // bytes at most that keep rows in memory, for all sessions; 0: none
  std::chrono::microseconds rom_delay{0};  // added to every bundle read, to imitate slow storage
  std::filesystem::path profile{};         // as in GraphOptions
  Provider provider = Provider::cpu;
  std::filesystem::path qnn_library{};  // libonnxruntime_providers_qnn.so; with Provider::qnn
  std::string soc{};                    // the compiled chip, by its name in the manifest; empty: the only one there is
};

// An opened package: what all its sessions share. Immutable and thread-safe. In a forked child it can be destroyed, and
// no more.
class Engine {
 public:
  // Throws PackageError if the package is unusable, std::invalid_argument for bad options, std::runtime_error if ONNX
  // Runtime cannot be loaded.
  static std::shared_ptr<const Engine> open(const std::filesystem::path& directory, const EngineOptions& options);

  // From parts; `rows` is what open_rows(manifest) gave: null exactly for a dense model. One step of each kind is
  // taken, which finds what does not fit the manifest; where the backend fails and has a fallback, that one is used.
  // Throws PackageError.
  static std::shared_ptr<const Engine> make(const std::shared_ptr<const RowSource>& rows,
                                            const std::shared_ptr<const Backend>& backend, int threads);

  // The same without taking a step.
  Engine(std::shared_ptr<const RowSource> rows, std::shared_ptr<const Backend> backend, int threads);

  // Of the model as it runs: without "memory" if that is off.
  const Manifest& manifest() const { return backend_->manifest(); }
  // Where the memory rows come from; null in a dense model.
  const std::shared_ptr<const RowSource>& rows() const { return rows_; }
  const Backend& backend() const { return *backend_; }
  int threads() const { return threads_; }
  // Throws std::runtime_error in a process that was forked off after the engine was made: its threads are not there.
  void check_process() const;
  // BatchExecutor::run for sequences of its sessions, one step at a time: a second caller waits. False: the backend
  // takes no such steps, and none was taken.
  bool run_batch(std::span<BatchMember> members) const;

 private:
  const std::shared_ptr<const RowSource> rows_;
  const std::shared_ptr<const Backend> backend_;
  const int threads_;
  const pid_t process_;
  mutable std::mutex batch_mutex_;
  mutable std::unique_ptr<BatchExecutor> batch_;  // made for the first step
};

}  // namespace meki
