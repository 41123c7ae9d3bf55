#include "runtime/rows/open_rows.h"

#include <fcntl.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/crc32c.h"
#include "runtime/base/error.h"
#include "runtime/base/file.h"
#include "runtime/rows/hashed_ngrams.h"

namespace meki {
namespace {

// A ROM whose bundles have `layers` rows of `row_dim` values.
std::shared_ptr<const TokenTable> open_table(const Manifest& manifest, RomAccess access, uint32_t layers,
                                             uint32_t row_dim, std::optional<uint64_t> entries) {
  const MemoryInfo& memory = *manifest.memory;
  const std::filesystem::path path = manifest.directory / memory.file;
  auto table = std::make_shared<const TokenTable>(path, access);
  const RomHeader& header = table->header();
  const auto require = [&path](const char* name, const std::string& got, const std::string& expected) {
    if (got != expected) {
      throw PackageError(path.string() + ": its " + name + " is " + got + ", expected " + expected +
                         "; the file belongs to another package");
    }
  };
  if (entries) require("vocabulary size", std::to_string(header.entries), std::to_string(*entries));
  require("number of layers", std::to_string(header.layers), std::to_string(layers));
  require("row dimension", std::to_string(header.row_dim), std::to_string(row_dim));
  require("row type", std::string(name_of(header.row_type)), memory.row_type);
  require("content id", header.content_id, memory.content_id);
  return table;
}

std::shared_ptr<const RowSource> open_token_table(const Manifest& manifest, RomAccess access) {
  const MemoryInfo& memory = *manifest.memory;
  return open_table(manifest, access, memory.layers, memory.row_dim, memory.vocab_size);
}

std::vector<int32_t> read_canonical(const Manifest& manifest) {
  const NgramHash& hash = manifest.memory->ngrams;
  if (hash.canonical.empty()) return {};
  const std::filesystem::path path = manifest.directory / hash.canonical;
  const File file(path, O_NONBLOCK);
  const uint64_t size = file.size(path);
  const uint64_t expected = manifest.architecture.vocab_size * sizeof(int32_t);
  if (size != expected) {  // before memory is taken for a vocabulary that is not there
    throw PackageError(path.string() + ": " + std::to_string(size) + " bytes, expected " + std::to_string(expected) +
                       ", an integer for each token; the file belongs to another package");
  }
  std::vector<int32_t> canonical(manifest.architecture.vocab_size);
  const auto bytes = std::as_writable_bytes(std::span(canonical));
  file.read(0, bytes, path);  // of a file that shrank meanwhile the checksum is wrong
  if (const uint32_t found = crc32c(bytes); found != hash.canonical_crc32c) {
    throw PackageError(path.string() + ": has checksum " + std::to_string(found) + ", the manifest says " +
                       std::to_string(hash.canonical_crc32c) + "; the file is damaged: restore it");
  }
  const auto limit = static_cast<int32_t>(manifest.architecture.vocab_size);
  if (std::any_of(canonical.begin(), canonical.end(), [limit](int32_t id) { return id < 0 || id >= limit; })) {
    throw PackageError(path.string() + ": a canonical id is outside the vocabulary, expected 0 to " +
                       std::to_string(limit - 1) + "; convert the model again");
  }
  return canonical;
}

std::shared_ptr<const RowSource> open_ngrams(const Manifest& manifest, RomAccess access) {
  const MemoryInfo& memory = *manifest.memory;
  const auto heads = static_cast<uint32_t>(memory.ngrams.heads_per_token());
  if (memory.row_dim % heads != 0) {
    throw PackageError((manifest.directory / "manifest.json").string() + ": memory.row_dim is " +
                       std::to_string(memory.row_dim) + ", expected a multiple of the " + std::to_string(heads) +
                       " heads of a token; convert the model again");
  }
  const auto table = open_table(manifest, access, 1, memory.row_dim / heads, std::nullopt);
  return std::make_shared<const HashedNgrams>(table, memory.ngrams, read_canonical(manifest), table->header().entries,
                                              (manifest.directory / memory.file).string());
}

// What opens the rows of each kind of address.
struct AddressKind {
  std::string_view name;
  std::shared_ptr<const RowSource> (*open)(const Manifest& manifest, RomAccess access);
};
constexpr AddressKind kAddressKinds[] = {
    {"token", open_token_table},
    {"ngram_hash", open_ngrams},
};

}  // namespace

std::shared_ptr<const RowSource> open_rows(const Manifest& manifest, RomAccess access) {
  if (!manifest.memory) return nullptr;
  std::string known;
  for (const AddressKind& kind : kAddressKinds) {
    if (kind.name == manifest.memory->address) return kind.open(manifest, access);
    known.append(known.empty() ? "" : " or ").append("\"").append(kind.name).append("\"");
  }
  throw PackageError((manifest.directory / "manifest.json").string() + ": memory.address.kind is \"" +
                     manifest.memory->address + "\", expected " + known +
                     ", which this runtime has; install a newer one");
}

}  // namespace meki
