#pragma once

#include "runtime/executor/backend.h"
#include "runtime/executor/stages.h"

namespace meki {

// Stages that take any number of tokens and update their KV caches in place: the package's own, on the CPU
// (docs/package-format.md, "Stages").
class DynamicBackend final : public Backend {
 public:
  // Throws PackageError if the stages do not fit the manifest, std::invalid_argument if the model's heads do not allow
  // the type of KV cache.
  DynamicBackend(const Manifest& manifest, KvType kv_type, const GraphLoader& load);

  std::unique_ptr<Executor> executor(size_t context, size_t chunk) const override;
  std::unique_ptr<BatchExecutor> batch_executor() const override;  // in dynamic_batch.cc

  const std::vector<Stage>& stages() const { return stages_; }
  // Names of the float32 [1, T, hidden] tensors that pass from stage to stage.
  const std::vector<std::string>& hidden_names() const { return hidden_names_; }
  // Layers of the memory that convolve over the tokens of a sequence.
  size_t convolutions() const { return convolutions_; }

 private:
  std::vector<Stage> stages_;
  std::vector<std::string> hidden_names_;
  size_t convolutions_ = 0;
};

extern const StageNames kDynamicNames;

}  // namespace meki
