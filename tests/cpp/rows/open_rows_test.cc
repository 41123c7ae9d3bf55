// runtime/rows/open_rows: whether a file of rows and the manifest fit together.

#include "runtime/rows/open_rows.h"

#include "runtime/base/error.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::TempDir;

TEST_CASE("open_rows: a file that is not the manifest's is an error that names what differs") {
  const TempDir dir;
  test::write_manifest(dir.path(), test::write_package_files(dir.path()));
  const Manifest good = Manifest::open(dir.path());
  REQUIRE(open_rows(good, RomAccess::pread) != nullptr);
  const auto error_with = [&good](auto change) {
    Manifest manifest = good;
    change(manifest);
    return error_of<PackageError>([&manifest] { open_rows(manifest, RomAccess::pread); });
  };
  const std::pair<const char*, std::string> cases[] = {
      {"vocab", error_with([](Manifest& m) { m.memory->vocab_size = 65; })},
      {"layers", error_with([](Manifest& m) { m.memory->layers = 3; })},
      {"row dimension", error_with([](Manifest& m) { m.memory->row_dim = 15; })},
      {"row type", error_with([](Manifest& m) { m.memory->row_type = "int4"; })},
      {"content id", error_with([](Manifest& m) { m.memory->content_id = std::string(32, '0'); })},
  };
  for (const auto& [name, message] : cases) {
    check_names(message, name);
    check_names(message, (dir / "memory.rom").string());
  }
  Manifest dense = good;
  dense.memory.reset();
  CHECK(open_rows(dense, RomAccess::mmap) == nullptr);
}

TEST_CASE("open_rows: an address that this runtime does not know is an error that names the known ones") {
  const TempDir dir;
  test::write_manifest(dir.path(), test::write_package_files(dir.path()));
  Manifest manifest = Manifest::open(dir.path());
  for (const char* address : {"", "ngram_hash", "Token"}) {
    manifest.memory->address = address;
    const std::string message = error_of<PackageError>([&] { open_rows(manifest, RomAccess::pread); });
    check_names(message, (dir / "manifest.json").string());
    check_names(message, std::string("\"").append(address).append("\", expected \"token\""));
  }
}

}  // namespace
}  // namespace meki
