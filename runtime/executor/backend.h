#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "runtime/executor/executor.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/package/manifest.h"

namespace meki {

// What computes: the package's graphs on the CPU, or those that are compiled for a chip on its NPU.
enum class Provider { cpu, qnn };

std::string_view name_of(Provider provider);
// Throws std::invalid_argument.
Provider parse_provider(std::string_view name);

struct BackendInfo {
  Provider provider = Provider::cpu;
  KvType kv_type = KvType::int8;
  size_t context = 0;                                 // the longest sequence that it can compute, in tokens
  std::string_view context_limit = "model supports";  // where that comes from, for messages
  std::string soc{};                                  // the chip that runs; empty with Provider::cpu
  bool simulated = false;                             // by a simulator of the chip: results as there, speed is not
  bool shared_memory = false;                         // sequences' state is in memory that the NPU shares; if not,
                                                      // an NPU copies all of it each step
};

// A model's stages, loaded: what makes the executors of its sequences. Immutable and thread-safe.
class Backend {
 public:
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // Of the model as it runs: without "memory" if that is off.
  const Manifest& manifest() const { return manifest_; }
  const BackendInfo& info() const { return info_; }

  // For sequences of up to `context` tokens, in steps of up to `chunk` tokens, or fewer: Executor::chunk() tells.
  // Throws std::runtime_error without memory for the state, std::bad_alloc without memory for anything else.
  virtual std::unique_ptr<Executor> executor(size_t context, size_t chunk) const = 0;
  // For steps of several sequences; null: it takes none.
  virtual std::unique_ptr<BatchExecutor> batch_executor() const { return nullptr; }
  // What to use in place of a backend that fails at its first step; null: nothing.
  virtual std::shared_ptr<const Backend> fallback() const { return nullptr; }

 protected:
  Backend(Manifest manifest, BackendInfo info) : manifest_(std::move(manifest)), info_(std::move(info)) {}

 private:
  const Manifest manifest_;
  const BackendInfo info_;
};

}  // namespace meki
