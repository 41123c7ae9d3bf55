#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/graph/graph.h"
#include "runtime/package/manifest.h"
#include "runtime/rows/prefetcher.h"

namespace meki {

// A stage of the model, ready to be bound.
struct Stage {
  std::unique_ptr<Graph> graph;
  std::optional<LayerRange> rows;  // memory rows that it takes
  std::filesystem::path path;
};

// What an input or output of a stage is (docs/package-format.md, "Stages").
enum class IoKind {
  token_ids,
  total_sequence_length,
  past_length,
  rows,
  logit_index,
  cache,        // of keys and values together, updated in place
  seen_cache,   // the same of a layer of an earlier stage, which has been updated
  convolution,  // the cache of a convolution's inputs, updated in place; not every layer has one
  keys,         // of past tokens as an input, of the step's as an output
  values,       // as keys
  // Those of a layer of an earlier stage, which this one sees as well:
  seen_keys,
  seen_values,
  seen_new_keys,  // of the step's tokens
  seen_new_values,
  logits,
  hidden,  // from an earlier stage, for a later one
};

struct Io {
  IoKind kind = IoKind::hidden;
  uint32_t layer = 0;  // of a cache, keys or values
  bool is_input = false;
};

// The names that the inputs and outputs of one kind of stages have; any other is a hidden tensor's.
struct StageNames {
  struct State {  // names that a layer's number follows
    std::string_view input;
    std::string_view output;  // empty: it is an input alone
    IoKind kind;
  };
  std::map<std::string_view, IoKind> inputs;
  std::map<std::string_view, IoKind> outputs;
  std::vector<State> states;
  std::string_view remedy;  // where stages and manifest disagree

  // Throws PackageError about the stage at `path` unless `valid`.
  void require(bool valid, const std::filesystem::path& path, const std::string& what) const;
  Io input(std::string_view name) const;
  Io output(std::string_view name) const;
};

// Checks that stages fit the manifest and each other: each state of all layers that have `caches` of their own in
// exactly one stage (convolutions: numbered from 0 on, perhaps fewer), every hidden input and every cache that is only
// seen made by an earlier stage or one of `entering`, no output made twice, rows where the manifest says. Returns the
// hidden tensors' names, those that enter first. Throws PackageError that names the stage.
std::vector<std::string> check_stages(const StageNames& names, const std::vector<Stage>& stages,
                                      const std::vector<KvCacheInfo>& caches, std::vector<std::string> entering = {});

// Layers that have a state of this kind, in stages that were checked.
size_t count_states(const StageNames& names, const std::vector<Stage>& stages, IoKind kind);

// The memory of the tensors that pass from stage to stage, float32 [1, tokens, width] each.
class HiddenTensors {
 public:
  // For up to `tokens` tokens. Throws std::runtime_error without memory.
  HiddenTensors(const std::vector<std::string>& names, size_t tokens, size_t width);
  Tensor tensor(const std::string& name, size_t tokens) const;

 private:
  size_t width_;
  std::map<std::string, Mapping> memory_;
};

// Memory of a step that is not the same for every step.
struct StepShape {
  size_t tokens = 1;
  float* rows = nullptr;  // float32 [layers, tokens, row_dim]; null in a dense model
  size_t logit_rows = 1;
  float* logits = nullptr;  // float32 [logit_rows, vocab_size]

  bool operator==(const StepShape&) const = default;
};

// The memory of one input or output in steps of a shape.
using TensorOf = std::function<Tensor(const std::string& name, Io io, const Stage& stage, const StepShape& shape)>;

// Stages bound to memory, for the shapes of step that were used last.
class BoundStages {
 public:
  // For up to `capacity` shapes. What is referred to outlives it.
  BoundStages(const StageNames& names, const std::vector<Stage>& stages, size_t capacity, TensorOf tensor_of);
  // Binds the stages for steps of a shape, unless they are. Throws PackageError.
  void bind(const StepShape& shape);
  // Runs all stages; calls wait_for_rows(), if it is not empty, before the first that takes some, and returns what that
  // returned. Allocates nothing where the shape is bound. Throws PackageError.
  uint64_t run(const StepShape& shape, const std::function<uint64_t()>& wait_for_rows);
  // The same for the rows of one request, which may be null.
  uint64_t run(const StepShape& shape, RowRequest* rows) {
    if (rows == nullptr) return run(shape, std::function<uint64_t()>());
    return run(shape, [rows] { return rows->wait(); });
  }

 private:
  struct Entry {
    StepShape shape;
    std::vector<std::unique_ptr<Binding>> bindings;  // of each stage
  };
  const StageNames& names_;
  const std::vector<Stage>& stages_;
  const size_t capacity_;
  const TensorOf tensor_of_;
  std::vector<Entry> entries_;  // the one that was used last in front
};

// The rows of a stage, which takes those of its layers of float32 [layers, shape.tokens, row_dim].
Tensor rows_tensor(const std::string& name, const Stage& stage, const StepShape& shape, uint32_t row_dim);

// Zeroed memory for `what`, or std::runtime_error that says how much it needs (nothing: more than 64 bits hold).
Mapping allocate(std::optional<uint64_t> bytes, const std::string& what);

}  // namespace meki
