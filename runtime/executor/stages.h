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
  cache,   // of keys and values together, updated in place
  keys,    // of past tokens as an input, of the step's as an output
  values,  // as keys
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
    std::string_view output;
    IoKind kind;
  };
  std::map<std::string_view, IoKind> inputs;
  std::map<std::string_view, IoKind> outputs;
  std::vector<State> states;
  std::string_view remedy;  // where stages and manifest disagree

  Io input(std::string_view name) const;
  Io output(std::string_view name) const;
};

// Checks that stages fit the manifest and each other: each state of all `layers` in exactly one stage, every hidden
// input made by an earlier stage or one of `entering`, no output made twice, rows where the manifest says. Returns the
// hidden tensors' names, those that enter first. Throws PackageError that names the stage.
std::vector<std::string> check_stages(const StageNames& names, const std::vector<Stage>& stages, uint32_t layers,
                                      std::vector<std::string> entering = {});

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

// Stages bound to memory, in order.
using Bindings = std::vector<std::unique_ptr<Binding>>;
// The memory of one input or output.
using TensorOf = std::function<Tensor(const std::string& name, Io io, const Stage& stage)>;
// Throws PackageError.
Bindings bind_stages(const StageNames& names, const std::vector<Stage>& stages, const TensorOf& tensor_of);

// Memory of a step that is not the same for every step.
struct StepShape {
  size_t tokens = 1;
  float* rows = nullptr;  // float32 [layers, tokens, row_dim]; null in a dense model
  size_t logit_rows = 1;
  float* logits = nullptr;  // float32 [logit_rows, vocab_size]

  bool operator==(const StepShape&) const = default;
};

// The bindings of the shapes that were used last.
class BindingCache {
 public:
  explicit BindingCache(size_t capacity);
  // `make` is called for a shape that is not there. Allocates nothing otherwise.
  const Bindings& get(const StepShape& shape, const std::function<Bindings(const StepShape&)>& make);

 private:
  struct Entry {
    StepShape shape;
    Bindings bindings;
  };
  size_t capacity_;
  std::vector<Entry> entries_;  // the one that was used last in front
};

// The rows of a stage, which takes those of its layers of float32 [layers, shape.tokens, row_dim].
Tensor rows_tensor(const std::string& name, const Stage& stage, const StepShape& shape, uint32_t row_dim);

// Runs all stages; waits for `rows`, if there are any, before the first that takes some, and returns the nanoseconds
// that took. Throws PackageError.
uint64_t run_stages(const std::vector<Stage>& stages, const Bindings& bindings, RowRequest* rows);

// Zeroed memory for `what`, or std::runtime_error that says how much it needs (nothing: more than 64 bits hold).
Mapping allocate(std::optional<uint64_t> bytes, const std::string& what);

}  // namespace meki
