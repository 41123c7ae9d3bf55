#include "runtime/package/parse.h"

namespace meki {

std::vector<StageInfo> parse_stages(const Node& node, const std::optional<MemoryInfo>& memory) {
  std::vector<StageInfo> stages;
  for (const Node& item : node.items()) {
    StageInfo stage{item.at("file").file_name(), std::nullopt};
    if (const Node rows = item.at("rows"); !rows.is_null()) {
      if (!memory) rows.fail("null in a package without a memory");
      const auto ends = rows.items();
      if (ends.size() != 2) rows.fail("null or [first layer, last layer + 1]");
      const auto first = static_cast<uint32_t>(ends[0].integer(0, memory->layers - 1));
      const auto last = static_cast<uint32_t>(ends[1].integer(first + 1, memory->layers));
      stage.rows = LayerRange{first, last};
    }
    stages.push_back(std::move(stage));
  }
  if (stages.empty()) node.fail("at least one stage");
  return stages;
}

FileSizes parse_files(const Node& node) {
  FileSizes files;
  for (const auto& [name, entry] : node.members()) {
    const Node::Json name_value(name);
    Node(name_value, node.where() + ": a name").file_name();
    files[name] = entry.at("bytes").integer(0, INT64_MAX);
  }
  return files;
}

void require_file(const Node& files, const std::string& name) {
  if (!files.has(name)) files.fail("an entry for \"" + name + "\"");
}

}  // namespace meki
