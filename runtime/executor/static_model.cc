#include "runtime/executor/static_model.h"

#include <algorithm>
#include <charconv>
#include <set>
#include <string_view>

#include "runtime/base/error.h"

namespace meki {
namespace {

using Names = std::vector<std::string>;

// "<prefix>N".
bool parse_layer(std::string_view name, std::string_view prefix, uint32_t& layer) {
  if (!name.starts_with(prefix)) return false;
  name.remove_prefix(prefix.size());
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
  return error == std::errc() && end == name.data() + name.size();
}

void require(bool valid, const std::filesystem::path& path, const std::string& what) {
  if (!valid) {
    throw PackageError(path.string() + ": " + what + "; the stage and the manifest disagree: compile the model again");
  }
}

// The checks of one pass through the layers, stage by stage.
class PassChecker {
 public:
  explicit PassChecker(uint32_t layers) : layers_(layers) {}

  void stage(const Stage& stage, const std::filesystem::path& path) {
    bool takes_rows = false;
    for (const std::string& name : stage.graph->inputs()) {
      const StaticIo io = parse_static_input(name);
      if (io.kind == StaticIoKind::rows) takes_rows = true;
      if (io.kind == StaticIoKind::past_key) cache(io, name, path, past_keys_);
      if (io.kind == StaticIoKind::past_value) cache(io, name, path, past_values_);
      if (io.kind == StaticIoKind::hidden) {
        const bool made = std::find(hidden_.begin(), hidden_.end(), name) != hidden_.end();
        require(made, path, "input \"" + name + "\" is neither known nor an output of an earlier stage");
      }
    }
    require(takes_rows == stage.rows.has_value(), path,
            takes_rows ? "it takes memory rows, the manifest says none"
                       : "it takes no memory rows, the manifest says some");
    for (const std::string& name : stage.graph->outputs()) {
      const StaticIo io = parse_static_output(name);
      if (io.kind == StaticIoKind::new_key) cache(io, name, path, new_keys_);
      if (io.kind == StaticIoKind::new_value) cache(io, name, path, new_values_);
      if (io.kind != StaticIoKind::hidden) continue;
      const bool again = std::find(hidden_.begin(), hidden_.end(), name) != hidden_.end();
      require(!again, path, "output \"" + name + "\" is an output of an earlier stage, too");
      hidden_.push_back(name);
    }
    require(past_keys_ == new_keys_ && past_values_ == new_values_ && past_keys_ == past_values_, path,
            "it does not take and make the keys and values of the same layers");
  }

  // After the last stage. The names of all hidden states.
  const Names& finish(const std::filesystem::path& last) const {
    require(past_keys_.size() == layers_, last,
            "the stages have the keys and values of " + std::to_string(past_keys_.size()) + " layers, expected " +
                std::to_string(layers_));
    require(hidden_.back() == kFinal, last, std::string("its last output is not \"") + kFinal + "\"");
    return hidden_;
  }

 private:
  void cache(const StaticIo& io, const std::string& name, const std::filesystem::path& path,
             std::set<uint32_t>& seen) const {
    require(io.layer < layers_, path,
            "\"" + name + "\" names layer " + std::to_string(io.layer) + " of " + std::to_string(layers_) + " layers");
    require(seen.insert(io.layer).second, path, "\"" + name + "\" names a layer twice");
  }

  uint32_t layers_;
  std::set<uint32_t> past_keys_, past_values_, new_keys_, new_values_;
  Names hidden_ = {kEmbedding};
};

void check_names(const Graph& graph, const std::filesystem::path& path, const Names& inputs, const Names& outputs) {
  require(graph.inputs() == inputs && graph.outputs() == outputs, path,
          "expected the one input \"" + inputs[0] + "\" and the one output \"" + outputs[0] + "\"");
}

}  // namespace

StaticIo parse_static_input(const std::string& name) {
  StaticIo io;
  if (name == "past_length") io.kind = StaticIoKind::past_length;
  if (name == "rows") io.kind = StaticIoKind::rows;
  if (parse_layer(name, "past_key.", io.layer)) io.kind = StaticIoKind::past_key;
  if (parse_layer(name, "past_value.", io.layer)) io.kind = StaticIoKind::past_value;
  return io;
}

StaticIo parse_static_output(const std::string& name) {
  StaticIo io;
  if (parse_layer(name, "new_key.", io.layer)) io.kind = StaticIoKind::new_key;
  if (parse_layer(name, "new_value.", io.layer)) io.kind = StaticIoKind::new_value;
  return io;
}

StaticModel load_static_model(const Manifest& manifest, const std::string& soc, bool simulated, const GraphLoader& cpu,
                              const GraphLoader& qnn) {
  const QnnTarget& target = manifest.qnn.at(soc);
  StaticModel model{.soc = soc, .simulated = simulated, .context = target.context, .chunk = target.chunk};
  const auto path = [&target](const std::string& file) { return target.directory / file; };
  model.embed = cpu(path(target.embed));
  check_names(*model.embed, path(target.embed), {"token_ids"}, {kEmbedding});
  std::set<std::string> hidden;
  const auto load = [&](const std::vector<StageInfo>& infos, std::vector<Stage>& stages) {
    PassChecker checker(manifest.architecture.layers);
    for (const StageInfo& info : infos) {
      stages.push_back({qnn(path(info.file)), info.rows});
      checker.stage(stages.back(), path(info.file));
    }
    const Names& names = checker.finish(path(infos.back().file));
    hidden.insert(names.begin(), names.end());
  };
  load(target.decode, model.decode);
  load(target.prefill, model.prefill);
  model.head = qnn(path(target.head));
  check_names(*model.head, path(target.head), {kFinal}, {"logits"});
  model.hidden_names.assign(hidden.begin(), hidden.end());
  // Whether there is any is known once some is given.
  model.shared_memory = model.decode.front().graph->allocate_shared(1) != nullptr;
  return model;
}

}  // namespace meki
