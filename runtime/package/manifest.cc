#include "runtime/package/manifest.h"

#include <fcntl.h>

#include <array>
#include <span>
#include <stdexcept>
#include <string_view>

#include "runtime/base/error.h"
#include "runtime/base/file.h"
#include "runtime/package/node.h"
#include "runtime/package/parse.h"

namespace meki {
namespace {

using Json = Node::Json;

constexpr size_t kMaxManifestBytes = 16 << 20;
constexpr uint64_t kVersion = 6;
constexpr uint64_t kOldestVersion = 5;  // which has no "kv_caches"
constexpr int kMaxDepth = 64;           // of nested JSON values; the format needs 4

constexpr uint64_t kMaxLayers = 65'535;
constexpr uint64_t kMaxWidth = 1 << 20;

Architecture parse_architecture(const Node& node) {
  const auto number = [&node](const char* key, uint64_t low, uint64_t high) {
    return static_cast<uint32_t>(node.at(key).integer(low, high));
  };
  Architecture architecture;
  architecture.vocab_size = number("vocab_size", 1, INT32_MAX);
  architecture.layers = number("layers", 1, kMaxLayers);
  architecture.hidden = number("hidden", 1, kMaxWidth);
  number("ffn", 1, kMaxWidth);  // of no use here, but a manifest without it is not one
  number("heads", 1, kMaxWidth);
  architecture.context = number("context", 1, INT32_MAX);
  architecture.kv_caches.assign(architecture.layers, {.kv_heads = number("kv_heads", 1, kMaxWidth),
                                                      .head_dim = number("head_dim", 1, kMaxWidth)});
  return architecture;
}

std::vector<KvCacheInfo> parse_kv_caches(const Node& node, uint32_t layers) {
  const std::vector<Node> items = node.items();
  if (items.size() != layers) node.fail("one for each of " + std::to_string(layers) + " layers");
  std::vector<KvCacheInfo> caches;
  for (const Node& item : items) {
    if (item.has("shared")) {
      const Node shared = item.at("shared");
      const auto layer = static_cast<uint32_t>(shared.integer(0, kMaxLayers));
      if (layer >= caches.size() || caches[layer].shared) shared.fail("an earlier layer with a cache of its own");
      caches.push_back(caches[layer]);
      caches.back().shared = layer;
      continue;
    }
    const auto number = [&item](const char* key, uint64_t low, uint64_t high) {
      return static_cast<uint32_t>(item.at(key).integer(low, high));
    };
    caches.push_back({.kv_heads = number("kv_heads", 1, kMaxWidth),
                      .head_dim = number("head_dim", 1, kMaxWidth),
                      .window = number("window", 0, INT32_MAX)});
  }
  return caches;
}

std::optional<MemoryInfo> parse_memory(const Node& node, uint32_t vocab_size) {
  if (node.is_null()) return std::nullopt;
  const Node address = node.at("address");
  const auto entries = [&] { return static_cast<uint32_t>(address.at("vocab_size").integer(1, vocab_size)); };
  const std::string addressed = address.at("kind").string();
  const auto layers = static_cast<uint32_t>(node.at("layers").integer(1, kMaxLayers));
  return MemoryInfo{.kind = node.at("kind").string(),
                    .address = addressed,
                    .ngrams = addressed == "ngram_hash" ? NgramHash::parse(address, vocab_size, layers) : NgramHash(),
                    .vocab_size = address.has("vocab_size") ? entries() : vocab_size,
                    .layers = layers,
                    .row_dim = static_cast<uint32_t>(node.at("row_dim").integer(1, kMaxWidth)),
                    .file = node.at("file").file_name(),
                    .row_type = node.at("row_type").string(),
                    .content_id = node.at("content_id").string()};
}

std::vector<StageInfo> parse_dense_stages(const Node& node, bool has_memory) {
  if (node.is_null() == has_memory) node.fail("null exactly when memory is null");
  std::vector<StageInfo> stages;
  if (node.is_null()) return stages;
  for (const Node& item : node.items()) stages.push_back({item.at("file").file_name(), std::nullopt});
  if (stages.empty()) node.fail("at least one stage");
  return stages;
}

constexpr const char* kCompileAgain = "compile the package again (meki-compile with --overwrite)";

// The files that make text and tokens of each other; what is in them is the caller's concern.
std::vector<std::string> parse_tokenizer_files(const Node& node) {
  std::vector<std::string> files = {node.at("file").file_name()};
  if (const Node chat = node.at("chat_template"); !chat.is_null()) files.push_back(chat.at("file").file_name());
  return files;
}

void check_size(const std::filesystem::path& path, uint64_t expected) {
  if (std::error_code error; !std::filesystem::exists(path, error)) {
    throw PackageError(path.string() + ": no such file, but the manifest names it; the package was copied in part: " +
                       "copy all of it, or make it again");
  }
  const File file(path, O_NONBLOCK);
  const uint64_t got = file.size(path);
  if (got == expected) return;
  constexpr std::string_view kLfsPointer = "version https://git-lfs.";  // how those files begin
  std::array<char, kLfsPointer.size()> start{};
  file.read(0, std::as_writable_bytes(std::span(start)), path);
  if (std::string_view(start.data(), start.size()) == kLfsPointer) {
    throw PackageError(path.string() + ": is a Git LFS pointer, not the file itself; fetch it: git lfs pull");
  }
  throw PackageError(path.string() + ": " + std::to_string(got) + " bytes, the manifest says " +
                     std::to_string(expected) + "; the file is truncated or belongs to another package");
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
  const Node version =
      root.at("version").with_remedy("convert the model again, or use a runtime of the package's version");
  if (const uint64_t its = version.integer(0, UINT32_MAX); its < kOldestVersion || its > kVersion) {
    version.fail(std::to_string(kOldestVersion) + " or " + std::to_string(kVersion));
  }
  manifest.name = root.at("name").string();
  manifest.architecture = parse_architecture(root.at("architecture"));
  if (root.has("kv_caches") && !root.at("kv_caches").is_null()) {
    manifest.architecture.kv_caches = parse_kv_caches(root.at("kv_caches"), manifest.architecture.layers);
  }
  manifest.memory = parse_memory(root.at("memory"), manifest.architecture.vocab_size);
  manifest.stages = parse_stages(root.at("stages"), manifest.memory);
  manifest.dense_stages = parse_dense_stages(root.at("dense_stages"), manifest.memory.has_value());
  manifest.weight_type = root.at("weights").at("type").string();
  const Node tokenizer = root.at("tokenizer");
  for (const Node& id : tokenizer.at("eos_token_ids").items()) {
    manifest.eos_token_ids.push_back(static_cast<int32_t>(id.integer(0, manifest.architecture.vocab_size - 1)));
  }
  const Node files = root.at("files");
  manifest.files = parse_files(files);
  for (const StageInfo& stage : manifest.stages) require_file(files, stage.file);
  for (const StageInfo& stage : manifest.dense_stages) require_file(files, stage.file);
  if (manifest.memory) {
    for (const std::string& file : manifest.memory->files()) require_file(files, file);
  }
  for (const std::string& file : parse_tokenizer_files(tokenizer)) require_file(files, file);
  if (json.contains("qnn")) manifest.qnn = parse_qnn(root.at("qnn").with_remedy(kCompileAgain), manifest);
  return manifest;
}

void Manifest::check_files() const {
  for (const auto& [file, bytes] : files) check_size(directory / file, bytes);
}

void Manifest::check_target_files(const std::string& soc) const {
  const QnnTarget& target = qnn.at(find_target(soc));
  if (memory) {
    for (const std::string& file : memory->files()) check_size(directory / file, files.at(file));
  }
  for (const auto& [file, bytes] : target.files) check_size(target.directory / file, bytes);
}

Manifest Manifest::without_memory() const {
  Manifest dense = *this;
  if (!memory) return dense;
  dense.memory.reset();
  dense.stages = dense_stages;
  for (auto& [chip, target] : dense.qnn) {
    target.decode = target.dense_decode;
    target.prefill = target.dense_prefill;
  }
  return dense;
}

std::string Manifest::find_target(const std::string& soc) const {
  if (qnn.contains(soc)) return soc;
  if (soc.empty() && qnn.size() == 1) return qnn.begin()->first;
  std::string compiled;
  for (const auto& [chip, target] : qnn) compiled += (compiled.empty() ? "" : ", ") + chip;
  const std::string package = directory.string();
  if (soc.empty() && !qnn.empty()) {
    throw std::invalid_argument(package + ": compiled for " + compiled + "; choose one of these chips");
  }
  throw std::invalid_argument(package + ": not compiled for " + (soc.empty() ? "any chip" : "\"" + soc + "\"") +
                              (compiled.empty() ? "" : ", only for " + compiled) + "; run meki-compile " + package +
                              " --soc " + (soc.empty() ? "sm8750" : soc));
}

}  // namespace meki
