#include "runtime/executor/stages.h"

#include <algorithm>
#include <charconv>
#include <new>
#include <set>
#include <stdexcept>
#include <utility>

#include "runtime/base/checked.h"
#include "runtime/base/error.h"

namespace meki {
namespace {

// The N of "<prefix>N".
std::optional<uint32_t> layer_of(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  uint32_t layer = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
  if (error != std::errc() || end != name.data() + name.size()) return std::nullopt;
  return layer;
}

Io parse(std::string_view name, bool is_input, const StageNames& names) {
  const auto& known = is_input ? names.inputs : names.outputs;
  if (const auto found = known.find(name); found != known.end()) return {found->second, 0, is_input};
  for (const StageNames::State& state : names.states) {
    const std::string_view prefix = is_input ? state.input : state.output;
    const auto layer = prefix.empty() ? std::nullopt : layer_of(name, prefix);
    if (layer) return {state.kind, *layer, is_input};
  }
  return {IoKind::hidden, 0, is_input};
}

// The state that an earlier stage has given back, of what a stage sees of it.
std::optional<IoKind> seen_state(IoKind kind) {
  switch (kind) {
    case IoKind::seen_cache: return IoKind::cache;
    case IoKind::seen_keys:
    case IoKind::seen_new_keys: return IoKind::keys;
    case IoKind::seen_values:
    case IoKind::seen_new_values: return IoKind::values;
    default: return std::nullopt;
  }
}

// The checks of one pass through the stages.
class Checker {
 public:
  Checker(const StageNames& names, const std::vector<KvCacheInfo>& caches, std::vector<std::string> entering)
      : names_(names), caches_(caches), hidden_(std::move(entering)) {}

  void stage(const Stage& stage) {
    path_ = stage.path;
    bool takes_rows = false;
    for (const std::string& name : stage.graph->inputs()) {
      const Io io = names_.input(name);
      if (io.kind == IoKind::rows) takes_rows = true;
      if (const auto seen = seen_state(io.kind)) {
        require(made_[*seen].contains(io.layer), "input \"" + name + "\" is the cache of no earlier stage");
      } else if (is_state(io)) {
        add(io, name, taken_[io.kind]);
      }
      if (io.kind == IoKind::hidden) {
        require(is_made(name), "input \"" + name + "\" is neither known nor an output of an earlier stage");
      }
    }
    require(takes_rows == stage.rows.has_value(), takes_rows ? "it takes memory rows, the manifest says none"
                                                             : "it takes no memory rows, the manifest says some");
    for (const std::string& name : stage.graph->outputs()) {
      const Io io = names_.output(name);
      if (is_state(io)) add(io, name, made_[io.kind]);
      if (io.kind == IoKind::logits) require(!std::exchange(logits_, true), "the stages make logits twice");
      if (io.kind != IoKind::hidden) continue;
      require(!is_made(name), "output \"" + name + "\" is an output of an earlier stage, too");
      hidden_.push_back(name);
    }
    for (const StageNames::State& state : names_.states) {
      if (state.output.empty()) continue;
      const IoKind all = state.kind == IoKind::convolution ? state.kind : names_.states.front().kind;
      require(taken_[state.kind] == taken_[all] && taken_[state.kind] == made_[state.kind],
              "it does not take and give back the caches of the same layers");
    }
  }

  // After the last stage.
  std::vector<std::string> finish() {
    const size_t found = taken_[names_.states.front().kind].size();
    const auto own = std::count_if(caches_.begin(), caches_.end(), [](const KvCacheInfo& its) { return !its.shared; });
    require(found == static_cast<size_t>(own),
            "the stages have the caches of " + std::to_string(found) + " layers, expected " + std::to_string(own));
    const std::set<uint32_t>& convolutions = taken_[IoKind::convolution];
    require(convolutions.empty() || *convolutions.rbegin() + 1 == convolutions.size(),
            "the convolutions are not numbered from 0 on");
    require(logits_ == names_.outputs.contains("logits"), "the stages make no logits");
    return std::move(hidden_);
  }

 private:
  bool is_state(const Io& io) const {
    return std::any_of(names_.states.begin(), names_.states.end(), [&io](const auto& s) { return s.kind == io.kind; });
  }
  bool is_made(const std::string& name) const {
    return std::find(hidden_.begin(), hidden_.end(), name) != hidden_.end();
  }
  void add(const Io& io, const std::string& name, std::set<uint32_t>& seen) const {
    require(io.layer < caches_.size(), "\"" + name + "\" names layer " + std::to_string(io.layer) + " of " +
                                           std::to_string(caches_.size()) + " layers");
    require(io.kind == IoKind::convolution || !caches_[io.layer].shared,
            "\"" + name + "\" is of a layer without a cache of its own");
    require(seen.insert(io.layer).second, "\"" + name + "\" names a layer twice");
  }
  void require(bool valid, const std::string& what) const { names_.require(valid, path_, what); }

  const StageNames& names_;
  const std::vector<KvCacheInfo>& caches_;
  std::filesystem::path path_;
  std::map<IoKind, std::set<uint32_t>> taken_;
  std::map<IoKind, std::set<uint32_t>> made_;
  std::vector<std::string> hidden_;
  bool logits_ = false;
};

}  // namespace

void StageNames::require(bool valid, const std::filesystem::path& path, const std::string& what) const {
  if (valid) return;
  throw PackageError(path.string() + ": " + what + "; the stage and the manifest disagree: " + std::string(remedy));
}

Io StageNames::input(std::string_view name) const { return parse(name, true, *this); }
Io StageNames::output(std::string_view name) const { return parse(name, false, *this); }

std::vector<std::string> check_stages(const StageNames& names, const std::vector<Stage>& stages,
                                      const std::vector<KvCacheInfo>& caches, std::vector<std::string> entering) {
  Checker checker(names, caches, std::move(entering));
  for (const Stage& stage : stages) checker.stage(stage);
  return checker.finish();
}

size_t count_states(const StageNames& names, const std::vector<Stage>& stages, IoKind kind) {
  size_t count = 0;
  for (const Stage& stage : stages) {
    for (const std::string& name : stage.graph->inputs()) count += names.input(name).kind == kind ? 1 : 0;
  }
  return count;
}

HiddenTensors::HiddenTensors(const std::vector<std::string>& names, size_t tokens, size_t width) : width_(width) {
  for (const std::string& name : names) {
    memory_[name] = allocate(checked_mul(tokens * sizeof(float), width), "a step of the model");
  }
}

Tensor HiddenTensors::tensor(const std::string& name, size_t tokens) const {
  return {name,
          ElementType::float32,
          {1, static_cast<int64_t>(tokens), static_cast<int64_t>(width_)},
          memory_.at(name).data()};
}

BoundStages::BoundStages(const StageNames& names, const std::vector<Stage>& stages, size_t capacity, TensorOf tensor_of)
    : names_(names), stages_(stages), capacity_(capacity), tensor_of_(std::move(tensor_of)) {
  entries_.reserve(capacity + 1);
}

void BoundStages::bind(const StepShape& shape) {
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&shape](const Entry& entry) { return entry.shape == shape; });
  if (found != entries_.end()) {
    std::rotate(entries_.begin(), found, found + 1);
    return;
  }
  Entry entry{shape, {}};
  for (const Stage& stage : stages_) {
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    for (const std::string& name : stage.graph->inputs()) {
      inputs.push_back(tensor_of_(name, names_.input(name), stage, shape));
    }
    for (const std::string& name : stage.graph->outputs()) {
      outputs.push_back(tensor_of_(name, names_.output(name), stage, shape));
    }
    entry.bindings.push_back(stage.graph->bind(inputs, outputs));
  }
  entries_.insert(entries_.begin(), std::move(entry));
  if (entries_.size() > capacity_) entries_.pop_back();
}

uint64_t BoundStages::run(const StepShape& shape, const std::function<uint64_t()>& wait_for_rows) {
  bind(shape);
  uint64_t stall = 0;
  bool waited = wait_for_rows == nullptr;
  for (size_t index = 0; index < stages_.size(); ++index) {
    if (!waited && stages_[index].rows) {
      stall = wait_for_rows();
      waited = true;
    }
    entries_.front().bindings[index]->run();
  }
  return stall;
}

Tensor rows_tensor(const std::string& name, const Stage& stage, const StepShape& shape, uint32_t row_dim) {
  return {name,
          ElementType::float32,
          {int64_t{stage.rows->last} - stage.rows->first, static_cast<int64_t>(shape.tokens), row_dim},
          shape.rows + stage.rows->first * shape.tokens * row_dim};
}

Mapping allocate(std::optional<uint64_t> bytes, const std::string& what) {
  try {
    if (bytes) return Mapping::zeroed(*bytes);
  } catch (const std::bad_alloc&) {
  }
  throw std::runtime_error(what + " needs " + (bytes ? std::to_string(*bytes >> 20) + " MiB" : "too much memory") +
                           ", which the system does not give; choose a smaller context");
}

}  // namespace meki
