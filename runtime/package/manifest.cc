#include "package/manifest.h"

#include <fcntl.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "base/file.h"

namespace meki {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxManifestBytes = 16 << 20;
constexpr uint64_t kVersion = 3;
constexpr int kMaxDepth = 64;  // of nested JSON values; the format needs 4

// A JSON value together with where it stands, for messages.
class Node {
 public:
  Node(const Json& value, std::string where) : value_(value), where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& expected) const {
    std::string got = value_.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (got.size() > 80) got = got.substr(0, 77) + "...";
    throw PackageError(where_ + " is " + got + ", expected " + expected + "; convert the model again");
  }
  Node at(const std::string& key) const {
    if (!value_.is_object()) fail("an object");
    const auto found = value_.find(key);
    if (found == value_.end()) throw PackageError(where_ + " has no \"" + key + "\"; convert the model again");
    return {*found, where_ + "." + key};
  }
  std::vector<Node> items() const {
    if (!value_.is_array()) fail("an array");
    std::vector<Node> nodes;
    for (size_t i = 0; i < value_.size(); ++i) nodes.emplace_back(value_[i], where_ + "[" + std::to_string(i) + "]");
    return nodes;
  }
  std::vector<std::pair<std::string, Node>> members() const {
    if (!value_.is_object()) fail("an object");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& [key, value] : value_.items()) nodes.emplace_back(key, Node(value, where_ + "." + key));
    return nodes;
  }
  bool is_null() const { return value_.is_null(); }
  std::string string() const {
    if (!value_.is_string()) fail("a string");
    return value_.get<std::string>();
  }
  uint64_t integer(uint64_t low, uint64_t high) const {
    const std::string expected = "an integer from " + std::to_string(low) + " to " + std::to_string(high);
    if (!value_.is_number_unsigned()) fail(expected);
    const auto number = value_.get<uint64_t>();
    if (number < low || number > high) fail(expected);
    return number;
  }
  // A plain name: the file stands in the package's own directory.
  std::string file_name() const {
    std::string name = string();
    const bool plain = !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
                       std::none_of(name.begin(), name.end(), [](char c) {
                         return c == '/' || c == '\\' || static_cast<unsigned char>(c) < 32 || c == 127;
                       });
    if (!plain) fail("a plain file name without directories");
    return name;
  }

 private:
  const Json& value_;
  std::string where_;
};

Architecture parse_architecture(const Node& node) {
  constexpr uint64_t kMaxWidth = 1 << 20;
  const auto number = [&node](const char* key, uint64_t low, uint64_t high) {
    return static_cast<uint32_t>(node.at(key).integer(low, high));
  };
  Architecture architecture;
  architecture.vocab_size = number("vocab_size", 1, INT32_MAX);
  architecture.layers = number("layers", 1, 65'535);
  architecture.hidden = number("hidden", 1, kMaxWidth);
  number("ffn", 1, kMaxWidth);  // of no use here, but a manifest without it is not one
  number("heads", 1, kMaxWidth);
  architecture.kv_heads = number("kv_heads", 1, kMaxWidth);
  architecture.head_dim = number("head_dim", 1, kMaxWidth);
  architecture.memory_dim = number("memory_dim", 0, kMaxWidth);
  architecture.context = number("context", 1, INT32_MAX);
  return architecture;
}

std::optional<MemoryInfo> parse_memory(const Node& node, const Architecture& architecture) {
  if (node.is_null() != (architecture.memory_dim == 0)) {
    node.fail("null exactly when architecture.memory_dim is 0");
  }
  if (node.is_null()) return std::nullopt;
  if (node.at("kind").string() != "meki") node.at("kind").fail("\"meki\"");
  return MemoryInfo{node.at("file").file_name(), node.at("row_type").string(), node.at("content_id").string()};
}

std::vector<StageInfo> parse_stages(const Node& node, const Architecture& architecture) {
  std::vector<StageInfo> stages;
  for (const Node& item : node.items()) {
    StageInfo stage{item.at("file").file_name(), std::nullopt};
    if (const Node rows = item.at("rows"); !rows.is_null()) {
      const auto ends = rows.items();
      if (ends.size() != 2) rows.fail("null or [first layer, last layer + 1]");
      const auto first = static_cast<uint32_t>(ends[0].integer(0, architecture.layers - 1));
      const auto last = static_cast<uint32_t>(ends[1].integer(first + 1, architecture.layers));
      if (architecture.memory_dim == 0) rows.fail("null in a package without a memory");
      stage.rows = LayerRange{first, last};
    }
    stages.push_back(std::move(stage));
  }
  if (stages.empty()) node.fail("at least one stage");
  return stages;
}

std::vector<StageInfo> parse_dense_stages(const Node& node, const Architecture& architecture) {
  if (node.is_null() != (architecture.memory_dim == 0)) {
    node.fail("null exactly when architecture.memory_dim is 0");
  }
  std::vector<StageInfo> stages;
  if (node.is_null()) return stages;
  for (const Node& item : node.items()) stages.push_back({item.at("file").file_name(), std::nullopt});
  if (stages.empty()) node.fail("at least one stage");
  return stages;
}

// The files that make text and tokens of each other; what is in them is the caller's concern.
std::vector<std::string> parse_tokenizer_files(const Node& node) {
  std::vector<std::string> files = {node.at("file").file_name()};
  if (const Node chat = node.at("chat_template"); !chat.is_null()) files.push_back(chat.at("file").file_name());
  return files;
}

void check_files(const Node& node, const Manifest& manifest, const std::vector<std::string>& tokenizer_files) {
  std::set<std::string> listed;
  for (const auto& [name, entry] : node.members()) {
    const Json name_value(name);
    Node(name_value, "manifest.json: a name in files").file_name();
    const uint64_t expected = entry.at("bytes").integer(0, INT64_MAX);
    const std::filesystem::path path = manifest.directory / name;
    const uint64_t got = File(path, O_NONBLOCK).size(path);
    if (got != expected) {
      throw PackageError(path.string() + ": " + std::to_string(got) + " bytes, the manifest says " +
                         std::to_string(expected) + "; the file is truncated or belongs to another package");
    }
    listed.insert(name);
  }
  const auto require = [&](const std::string& name) {
    if (!listed.contains(name)) node.fail("an entry for \"" + name + "\"");
  };
  for (const StageInfo& stage : manifest.stages) require(stage.file);
  for (const StageInfo& stage : manifest.dense_stages) require(stage.file);
  if (manifest.memory) require(manifest.memory->file);
  for (const std::string& file : tokenizer_files) require(file);
}

}  // namespace

Manifest Manifest::open(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "manifest.json";
  Manifest manifest;
  manifest.directory = directory;
  if (std::error_code error; !std::filesystem::exists(path, error)) {
    throw PackageError(path.string() + ": no such file, so " + directory.string() +
                       " is not a package; give the path of a directory that meki-convert wrote");
  }
  manifest.json = read_text(path, kMaxManifestBytes);
  Json json;
  try {
    json = Json::parse(manifest.json, [&path](int depth, Json::parse_event_t, Json&) {
      if (depth > kMaxDepth) throw PackageError(path.string() + ": nested deeper than any manifest");
      return true;
    });
  } catch (const Json::exception& error) {
    throw PackageError(path.string() + ": not valid JSON: " + error.what());
  }

  const Node root(json, path.string());
  if (root.at("format").string() != "meki-package") root.at("format").fail("\"meki-package\"");
  if (root.at("version").integer(0, UINT32_MAX) != kVersion) {
    root.at("version").fail(std::to_string(kVersion) +
                            " (convert the model again, or use a runtime of the package's version)");
  }
  manifest.name = root.at("name").string();
  manifest.architecture = parse_architecture(root.at("architecture"));
  manifest.memory = parse_memory(root.at("memory"), manifest.architecture);
  manifest.stages = parse_stages(root.at("stages"), manifest.architecture);
  manifest.dense_stages = parse_dense_stages(root.at("dense_stages"), manifest.architecture);
  const Node tokenizer = root.at("tokenizer");
  for (const Node& id : tokenizer.at("eos_token_ids").items()) {
    manifest.eos_token_ids.push_back(static_cast<int32_t>(id.integer(0, manifest.architecture.vocab_size - 1)));
  }
  check_files(root.at("files"), manifest, parse_tokenizer_files(tokenizer));
  return manifest;
}

}  // namespace meki
