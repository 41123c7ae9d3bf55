#include <algorithm>
#include <filesystem>

#include "runtime/package/parse.h"

namespace meki {
namespace {

bool is_chip_name(const std::string& name) {
  constexpr size_t kMaxName = 64;
  return !name.empty() && name.size() <= kMaxName && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-';
  });
}

bool same_rows(const StageInfo& a, const StageInfo& b) {
  if (!a.rows || !b.rows) return !a.rows && !b.rows;
  return a.rows->first == b.rows->first && a.rows->last == b.rows->last;
}

// A graph for one token and one for a chunk of them, cut alike.
void parse_pair(const Node& decode_node, const Node& prefill_node, const std::optional<MemoryInfo>& memory,
                std::vector<StageInfo>& decode, std::vector<StageInfo>& prefill) {
  decode = parse_stages(decode_node, memory);
  prefill = parse_stages(prefill_node, memory);
  if (!std::equal(decode.begin(), decode.end(), prefill.begin(), prefill.end(), same_rows)) {
    prefill_node.fail("stages with the same rows as those of " + decode_node.where());
  }
}

void parse_dense(const Node& node, const Manifest& manifest, QnnTarget& target) {
  const Node decode = node.at("dense_decode");
  const Node prefill = node.at("dense_prefill");
  if (decode.is_null() != prefill.is_null()) prefill.fail("null exactly when dense_decode is null");
  if (decode.is_null()) return;
  if (!manifest.memory) decode.fail("null in a package without a memory");
  parse_pair(decode, prefill, std::nullopt, target.dense_decode, target.dense_prefill);
}

void require_files(const Node& files, const QnnTarget& target) {
  require_file(files, target.embed);
  std::vector<std::string> compiled = {target.head};
  for (const auto* stages : {&target.decode, &target.prefill, &target.dense_decode, &target.dense_prefill}) {
    for (const StageInfo& stage : *stages) compiled.push_back(stage.file);
  }
  for (const std::string& file : compiled) {
    require_file(files, file);
    require_file(files, std::filesystem::path(file).stem().string() + "_qnn.bin");
  }
}

QnnTarget parse_target(const std::string& name, const Node& node, const Manifest& manifest) {
  QnnTarget target;
  target.directory = manifest.directory / "qnn" / name;
  target.chip = node.at("chip").string();
  target.precision = node.at("precision").string();
  target.soc_model = static_cast<uint32_t>(node.at("soc_model").integer(0, INT32_MAX));
  target.htp_arch = static_cast<uint32_t>(node.at("htp_arch").integer(1, INT32_MAX));
  target.context = static_cast<uint32_t>(node.at("context").integer(1, manifest.architecture.context));
  target.chunk = static_cast<uint32_t>(node.at("chunk").integer(1, target.context));
  target.embed = node.at("embed").file_name();
  target.head = node.at("head").file_name();
  parse_pair(node.at("decode"), node.at("prefill"), manifest.memory, target.decode, target.prefill);
  parse_dense(node, manifest, target);
  const Node files = node.at("files");
  target.files = parse_files(files);
  require_files(files, target);
  return target;
}

}  // namespace

std::map<std::string, QnnTarget> parse_qnn(const Node& node, const Manifest& manifest) {
  std::map<std::string, QnnTarget> targets;
  for (const auto& [name, target] : node.members()) {
    if (!is_chip_name(name)) {
      const Node::Json value(name);
      Node(value, node.where() + ": a name", "compile the package again")
          .fail("a chip's name of 1 to 64 lower-case letters, digits and dashes");
    }
    targets[name] = parse_target(name, target, manifest);
  }
  return targets;
}

}  // namespace meki
