#include "runtime/executor/stage_io.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <set>
#include <string_view>

#include "runtime/base/error.h"
#include "runtime/engine/engine.h"

namespace meki {
namespace {

// "<prefix>N".
std::optional<IoName> parse_cache(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  uint32_t layer = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
  if (error != std::errc() || end != name.data() + name.size()) return std::nullopt;
  return IoName{IoKind::cache, layer};
}

class StageChecker {
 public:
  StageChecker(const Manifest& manifest, size_t index)
      : where_((manifest.directory / manifest.stages[index].file).string()), layers_(manifest.architecture.layers) {}

  void require(bool valid, const std::string& what) const {
    if (!valid)
      throw PackageError(where_ + ": " + what + "; the stage and the manifest disagree: convert the model again");
  }
  void cache_layer(const IoName& io, const std::string& name) const {
    require(io.layer < layers_,
            "\"" + name + "\" names layer " + std::to_string(io.layer) + " of " + std::to_string(layers_) + " layers");
  }

 private:
  std::string where_;
  uint32_t layers_;
};

}  // namespace

IoName parse_input(const std::string& name) {
  static const std::map<std::string_view, IoKind> known = {
      {"token_ids", IoKind::token_ids},
      {"total_sequence_length", IoKind::total_sequence_length},
      {"rows", IoKind::rows},
      {"logit_index", IoKind::logit_index},
  };
  if (const auto found = known.find(name); found != known.end()) return {found->second, 0};
  return parse_cache(name, "past.").value_or(IoName{});
}

IoName parse_output(const std::string& name) {
  if (name == "logits") return {IoKind::logits, 0};
  return parse_cache(name, "present.").value_or(IoName{});
}

std::vector<std::string> check_stages(const Manifest& manifest, const std::vector<Stage>& stages) {
  const size_t caches = manifest.architecture.layers;
  std::set<uint32_t> past;
  std::set<uint32_t> present;
  std::vector<std::string> hidden;
  size_t logits = 0;
  for (size_t index = 0; index < stages.size(); ++index) {
    const StageChecker check(manifest, index);
    bool takes_rows = false;
    for (const std::string& name : stages[index].graph->inputs()) {
      const IoName io = parse_input(name);
      if (io.kind == IoKind::rows) takes_rows = true;
      if (io.kind == IoKind::cache) {
        check.cache_layer(io, name);
        check.require(past.insert(io.layer).second, "the cache of \"" + name + "\" is an input twice");
      }
      if (io.kind == IoKind::hidden) {
        const bool made = std::find(hidden.begin(), hidden.end(), name) != hidden.end();
        check.require(made, "input \"" + name + "\" is neither known nor an output of an earlier stage");
      }
    }
    check.require(takes_rows == stages[index].rows.has_value(),
                  takes_rows ? "it takes memory rows, the manifest says none"
                             : "it takes no memory rows, the manifest says some");
    for (const std::string& name : stages[index].graph->outputs()) {
      const IoName io = parse_output(name);
      if (io.kind == IoKind::logits) ++logits;
      if (io.kind == IoKind::cache) {
        check.cache_layer(io, name);
        check.require(present.insert(io.layer).second, "the cache of \"" + name + "\" is an output twice");
      }
      if (io.kind == IoKind::hidden) hidden.push_back(name);
    }
    check.require(past == present, "it does not give back the caches that it takes");
  }
  const StageChecker check(manifest, stages.size() - 1);
  check.require(past.size() == caches && present.size() == caches,
                "the stages have " + std::to_string(past.size()) + " caches in and " + std::to_string(present.size()) +
                    " out, expected " + std::to_string(caches));
  check.require(logits == 1, "the stages make logits " + std::to_string(logits) + " times, expected once");
  return hidden;
}

}  // namespace meki
