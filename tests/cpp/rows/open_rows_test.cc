// runtime/rows/open_rows: whether a file of rows and the manifest fit together.

#include "runtime/rows/open_rows.h"

#include <sys/resource.h>

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
  for (const char* address : {"", "ngram", "Token"}) {
    manifest.memory->address = address;
    const std::string message = error_of<PackageError>([&] { open_rows(manifest, RomAccess::pread); });
    check_names(message, (dir / "manifest.json").string());
    check_names(message, std::string("\"").append(address).append("\", expected \"token\" or \"ngram_hash\""));
  }
}

// Bytes of memory that this process has had at most.
uint64_t peak_memory() {
  rusage usage{};
  REQUIRE(::getrusage(RUSAGE_SELF, &usage) == 0);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

// A package whose rows hashed n-grams tell; `manifest` is what is on disk.
struct NgramPackage {
  NgramPackage() : manifest(test::write_ngram_package_files(dir.path())) { test::write_manifest(dir.path(), manifest); }
  // What is said to whoever opens the package's rows.
  std::string error() const {
    return error_of<PackageError>([this] { open_rows(Manifest::open(dir.path()), RomAccess::pread); });
  }
  // The manifest says of the canonical ids that they are these.
  std::string error_of_canonical(std::span<const uint8_t> bytes) {
    test::write_file(dir / "canonical_ids.bin", bytes);
    manifest["files"]["canonical_ids.bin"]["bytes"] = bytes.size();
    manifest["memory"]["address"]["canonical"]["crc32c"] = test::naive_crc32c(bytes);
    test::write_manifest(dir.path(), manifest);
    return error();
  }

  TempDir dir;
  nlohmann::json manifest;
};

TEST_CASE("open_rows: n-grams, with canonical ids and without") {
  NgramPackage package;
  const auto first_keys = [&package] {
    const auto rows = open_rows(Manifest::open(package.dir.path()), RomAccess::pread);
    REQUIRE(rows != nullptr);
    CHECK(rows->shape().layers == 2);
    CHECK(rows->shape().row_dim == 16);
    CHECK(rows->part().row_dim == 4);
    CHECK(rows->history() == 2);
    CHECK(rows->access() == "pread");
    std::vector<RowKey> keys(8);
    REQUIRE(rows->keys_per_token() == keys.size());
    rows->keys(std::vector<int32_t>{20, 31}, keys);
    return std::pair(keys[0].index, keys[3].index);
  };
  // By hand: 15 * 5 = 75, 10 * 7 = 70, 1 * 11; 75 ^ 70 = 13, 13 ^ 11 = 6.
  CHECK(first_keys() == std::pair<uint64_t, uint64_t>{13 % 3 + 0, 6 % 11 + 15});
  package.manifest["memory"]["address"]["canonical"] = nullptr;
  test::write_manifest(package.dir.path(), package.manifest);
  // 31 * 5 = 155, 20 * 7 = 140; 155 ^ 140 = 23, 23 ^ 11 = 28.
  CHECK(first_keys() == std::pair<uint64_t, uint64_t>{23 % 3 + 0, 28 % 11 + 15});
}

TEST_CASE("open_rows: a ROM that is not that of the n-grams is an error that names what differs") {
  using test::RomImage;
  const auto error_with = [](const test::RomShape& shape) {
    NgramPackage package;
    const RomImage rom(shape, 3, 4);
    test::write_file(package.dir / "memory.rom", rom.bytes);
    package.manifest["files"]["memory.rom"]["bytes"] = rom.bytes.size();
    test::write_manifest(package.dir.path(), package.manifest);
    const std::string message = package.error();
    check_names(message, (package.dir / "memory.rom").string());
    return message;
  };
  check_names(error_with({.vocab_size = 40, .layers = 2, .row_dim = 4, .row_type = test::kInt8}), "number of layers");
  check_names(error_with({.vocab_size = 40, .layers = 1, .row_dim = 16, .row_type = test::kInt8}), "row dimension");
  check_names(error_with({.vocab_size = 40, .layers = 1, .row_dim = 4, .row_type = test::kFloat16}), "row type");
  check_names(error_with({.vocab_size = 39, .layers = 1, .row_dim = 4, .row_type = test::kInt8}), "row 39");

  NgramPackage package;
  package.manifest["memory"]["content_id"] = std::string(32, '0');
  test::write_manifest(package.dir.path(), package.manifest);
  check_names(package.error(), "content id");
}

TEST_CASE("open_rows: rows that the heads do not share evenly are an error that names row_dim") {
  NgramPackage package;
  for (const int row_dim : {1, 3, 15, 17}) {
    package.manifest["memory"]["row_dim"] = row_dim;
    test::write_manifest(package.dir.path(), package.manifest);
    const std::string message = package.error();
    check_names(message, (package.dir / "manifest.json").string());
    check_names(message, "memory.row_dim is " + std::to_string(row_dim));
    check_names(message, "4 heads");
  }
}

TEST_CASE(
    "open_rows: canonical ids that are missing, damaged or of another vocabulary are an error that names the file") {
  const auto refused = [](auto damage) {
    NgramPackage package;
    const std::filesystem::path file = package.dir / "canonical_ids.bin";
    damage(file);
    const std::string message = package.error();
    check_names(message, file.string());
    return message;
  };
  using std::filesystem::path;
  refused([](const path& file) { std::filesystem::remove(file); });
  refused([](const path& file) {
    std::filesystem::remove(file);
    std::filesystem::create_directory(file);
  });
  refused([](const path& file) {
    std::filesystem::remove(file);
    test::make_fifo(file);  // must not wait for a writer
  });
  for (const uintmax_t bytes : {0, 4, 128, 255, 257, 260}) {
    check_names(refused([bytes](const path& file) { std::filesystem::resize_file(file, bytes); }), "expected 256");
  }
  for (const size_t at : {0, 3, 255}) {
    const uint8_t bad[] = {0x20};
    check_names(refused([&](const path& file) { test::patch_file(file, at, bad); }), "damaged");
  }

  std::vector<uint8_t> canonical(64 * sizeof(int32_t));
  for (const uint32_t id : {64U, 0x7FFFFFFFU, 0x80000000U, 0xFFFFFFFFU}) {
    for (const size_t token : {0, 63}) {
      std::vector<uint8_t> bytes = canonical;
      test::put(bytes, token * sizeof(int32_t), id);
      check_names(NgramPackage().error_of_canonical(bytes), "canonical_ids.bin");
    }
  }
  canonical.resize(canonical.size() / 2);  // what the manifest says, and not what the vocabulary needs
  check_names(NgramPackage().error_of_canonical(canonical), "expected 256");
}

TEST_CASE("open_rows: a vocabulary that its canonical ids do not have takes no memory") {
  NgramPackage package;
  package.manifest["architecture"]["vocab_size"] = INT32_MAX;
  package.manifest["memory"]["address"]["layers"][1]["multipliers"][2] = 1;
  test::write_manifest(package.dir.path(), package.manifest);
  const uint64_t before = peak_memory();
  check_names(package.error(), "expected " + std::to_string(uint64_t{INT32_MAX} * 4));
  CHECK(peak_memory() < before + (uint64_t{1} << 30));
}

}  // namespace
}  // namespace meki
