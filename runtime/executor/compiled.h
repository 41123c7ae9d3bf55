#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/executor/backend.h"
#include "runtime/executor/stages.h"

namespace meki {

// The stages of a package that is compiled for a chip. They have static shapes: one token, or `chunk` of them, over a
// KV cache of `context` tokens that they read and do not write (docs/package-format.md, "Compiled stages"). Immutable.
struct CompiledModel {
  size_t context = 0;
  size_t chunk = 0;
  std::unique_ptr<Graph> embed{};  // token ids to hidden states; takes any number of them
  std::vector<Stage> decode{};
  std::vector<Stage> prefill{};
  std::unique_ptr<Graph> head{};  // one hidden state to logits
  // Names of the float32 [1, T, hidden] tensors that pass from stage to stage.
  std::vector<std::string> hidden_names{};
};

// Compiled stages on an NPU, or in its simulator: one token runs the decode graph, more run the prefill graph, padded
// to its width.
class CompiledBackend final : public Backend {
 public:
  // Loads and checks the target `soc` of the manifest: embed with `cpu`, everything else with `qnn`. Throws
  // PackageError.
  static std::shared_ptr<const Backend> load(const Manifest& manifest, const std::string& soc, bool simulated,
                                             const GraphLoader& cpu, const GraphLoader& qnn);

  std::unique_ptr<Executor> executor(size_t context, size_t chunk) const override;
  // The same stages with ordinary memory, where this backend has the NPU's.
  std::shared_ptr<const Backend> fallback() const override;

  const CompiledModel& model() const { return *model_; }

 private:
  CompiledBackend(const Manifest& manifest, const BackendInfo& info, std::shared_ptr<const CompiledModel> model)
      : Backend(manifest, info), model_(std::move(model)) {}

  std::shared_ptr<const CompiledModel> model_;
};

extern const StageNames kCompiledNames;

}  // namespace meki
