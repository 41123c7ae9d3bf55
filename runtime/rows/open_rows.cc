#include "runtime/rows/open_rows.h"

#include <filesystem>
#include <string>
#include <string_view>

#include "runtime/base/error.h"

namespace meki {
namespace {

std::shared_ptr<const RowSource> open_token_table(const Manifest& manifest, RomAccess access) {
  const MemoryInfo& memory = *manifest.memory;
  const std::filesystem::path path = manifest.directory / memory.file;
  auto table = std::make_shared<const TokenTable>(path, access);
  const RomHeader& header = table->header();
  const auto require = [&path](const char* name, const std::string& got, const std::string& expected) {
    if (got != expected) {
      throw PackageError(path.string() + ": its " + name + " is " + got + ", the manifest says " + expected +
                         "; the file belongs to another package");
    }
  };
  require("vocabulary size", std::to_string(header.vocab_size), std::to_string(memory.vocab_size));
  require("number of layers", std::to_string(header.layers), std::to_string(memory.layers));
  require("row dimension", std::to_string(header.row_dim), std::to_string(memory.row_dim));
  require("row type", std::string(name_of(header.row_type)), memory.row_type);
  require("content id", header.content_id, memory.content_id);
  return table;
}

// What opens the rows of each kind of address.
struct AddressKind {
  std::string_view name;
  std::shared_ptr<const RowSource> (*open)(const Manifest& manifest, RomAccess access);
};
constexpr AddressKind kAddressKinds[] = {
    {"token", open_token_table},
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
