// runtime/package/ngram_hash: the address of hashed n-grams in a manifest, against docs/package-format.md, "N-grams".

#include "runtime/package/ngram_hash.h"

#include "runtime/base/error.h"
#include "runtime/package/manifest.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using nlohmann::json;
using test::check_names;
using test::error_of;
using test::TempDir;

// A valid package with n-grams in a directory of its own; `manifest` is what is on disk.
struct Package {
  Package() : manifest(test::write_ngram_package_files(dir.path())) { test::write_manifest(dir.path(), manifest); }
  Manifest open_with(const json& changed) const {
    test::write_manifest(dir.path(), changed);
    return Manifest::open(dir.path());
  }
  // What is said to a package whose memory has this at `pointer`.
  std::string error_with(const std::string& pointer, const json& value) const {
    json changed = manifest;
    changed[json::json_pointer("/memory" + pointer)] = value;
    return error_of<PackageError>([&] { open_with(changed); });
  }

  TempDir dir;
  json manifest;
};

// What an address needs: JSON pointers into the memory, and the type of each.
constexpr const char* kNeeded[] = {
    "/address/ngram",
    "/address/heads",
    "/address/pad",
    "/address/reset",
    "/address/canonical",
    "/address/canonical/file",
    "/address/canonical/crc32c",
    "/address/layers",
    "/address/layers/1/multipliers",
    "/address/layers/1/primes",
    "/address/layers/1/offsets",
};

TEST_CASE("n-grams: a valid address parses") {
  const Package package;
  const Manifest manifest = package.open_with(package.manifest);
  REQUIRE(manifest.memory);
  CHECK(manifest.memory->address == "ngram_hash");
  CHECK(manifest.memory->layers == 2);
  CHECK(manifest.memory->row_dim == 16);
  const NgramHash& hash = manifest.memory->ngrams;
  CHECK(hash.ngram == 3);
  CHECK(hash.heads == 2);
  CHECK(hash.heads_per_token() == 4);
  CHECK(hash.pad == 1);
  CHECK(hash.reset == std::vector<int32_t>{0, 63});
  CHECK(hash.canonical == "canonical_ids.bin");
  CHECK(hash.canonical_crc32c == package.manifest["memory"]["address"]["canonical"]["crc32c"]);
  REQUIRE(hash.layers.size() == 2);
  CHECK(hash.layers[0].multipliers == std::vector<uint64_t>{5, 7, 11});
  CHECK(hash.layers[0].primes == std::vector<uint64_t>{3, 5, 7, 11});
  CHECK(hash.layers[0].offsets == std::vector<uint64_t>{0, 3, 8, 15});
  CHECK(hash.layers[1].multipliers == std::vector<uint64_t>{13, 17, 144115188075855871});
  CHECK(hash.layers[1].primes == std::vector<uint64_t>{2, 3, 5, 7});
  CHECK(hash.layers[1].offsets == std::vector<uint64_t>{26, 28, 31, 33});
  CHECK_NOTHROW(manifest.check_files());
}

TEST_CASE("n-grams: token ids may be canonical, and nothing need reset") {
  const Package package;
  json changed = package.manifest;
  changed["memory"]["address"]["canonical"] = nullptr;
  changed["memory"]["address"]["reset"] = json::array();
  changed["files"].erase("canonical_ids.bin");
  const NgramHash hash = package.open_with(changed).memory->ngrams;
  CHECK(hash.canonical.empty());
  CHECK(hash.reset.empty());
}

TEST_CASE("n-grams: the limits themselves are valid") {
  const Package package;
  json changed = package.manifest;
  json& address = changed["memory"]["address"];
  address["ngram"] = 8;
  address["heads"] = 292;  // 7 * 292 * 2 layers are 4,088 rows
  address["pad"] = 63;
  address["canonical"]["crc32c"] = UINT32_MAX;
  const std::vector<uint64_t> many(size_t{7} * 292, INT32_MAX);
  const std::vector<uint64_t> multipliers(8, static_cast<uint64_t>(INT64_MAX / 64));
  for (json& layer : address["layers"]) layer = {{"multipliers", multipliers}, {"primes", many}, {"offsets", many}};
  CHECK(package.open_with(changed).memory->ngrams.heads_per_token() == many.size());

  changed["architecture"]["vocab_size"] = INT32_MAX;
  for (json& layer : address["layers"]) {
    layer["multipliers"] = std::vector<uint64_t>(8, static_cast<uint64_t>(INT64_MAX / INT32_MAX));
  }
  CHECK_NOTHROW(package.open_with(changed));
  address["layers"][1]["multipliers"][7] = static_cast<uint64_t>(INT64_MAX / INT32_MAX) + 1;
  check_names(error_of<PackageError>([&] { package.open_with(changed); }), "multipliers[7]");

  changed = package.manifest;
  changed["memory"]["address"]["ngram"] = 2;
  changed["memory"]["address"]["heads"] = 2048;  // 4,096 rows
  const std::vector<uint64_t> all(2048, 1);
  for (json& layer : changed["memory"]["address"]["layers"]) {
    layer = {{"multipliers", {1, 1}}, {"primes", all}, {"offsets", all}};
  }
  CHECK_NOTHROW(package.open_with(changed));
  changed["memory"]["address"]["heads"] = 2049;
  const std::string message = error_of<PackageError>([&] { package.open_with(changed); });
  check_names(message, "memory.address.heads");
  check_names(message, "4096 rows");
}

TEST_CASE("n-grams: a missing key is an error that names it") {
  const Package package;
  for (const std::string needed : kNeeded) {
    CAPTURE(needed);
    const json::json_pointer pointer("/memory" + needed);
    json changed = package.manifest;
    changed[pointer.parent_pointer()].erase(pointer.back());
    const std::string message = error_of<PackageError>([&] { package.open_with(changed); });
    check_names(message, "no \"" + pointer.back() + "\"");
    check_names(message, (package.dir / "manifest.json").string());
  }
}

TEST_CASE("n-grams: a value of the wrong type is an error that names its key") {
  const Package package;
  const json wrong = json::parse(R"([
    -1, -9223372036854775807, 1.5, 1e30, 18446744073709551616, null, true, "not a name", "", [], {}, [[]], [{}], ["1"]
  ])");
  for (const std::string needed : kNeeded) {
    const json::json_pointer pointer("/memory" + needed);
    for (const json& value : wrong) {
      const json& good = package.manifest[pointer];
      if (value.type() == good.type() && !(value.is_array() && !value.empty())) continue;  // right type: other tests
      if (pointer.back() == "canonical" && value.is_null()) continue;                      // may be null
      CAPTURE(needed);
      CAPTURE(value.dump());
      check_names(package.error_with(needed, value), pointer.back());
    }
  }
}

TEST_CASE(
    "n-grams: values outside their limits, and more or fewer than there should be, are errors that name their key") {
  const Package package;
  const std::pair<const char*, const char*> cases[] = {
      // a key, and an array of wrong values
      {"/address/ngram", "[0, 1, 2, 4, 8, 9, 4294967299, 18446744073709551615]"},
      {"/address/heads", "[0, 1, 3, 4097, 4294967298, 18446744073709551615]"},
      {"/address/pad", "[64, 4294967296, 2147483648, 18446744073709551615]"},
      {"/address/reset", R"([[64], [0, 2147483648], [0, -1], [0.5], [null], [4294967296]])"},
      {"/address/canonical/file", R"(["", ".", "..", "/etc/passwd", "../canonical_ids.bin", "a/b", "a\u0000b"])"},
      {"/address/canonical/crc32c", "[4294967296, 18446744073709551615]"},
      {"/address/layers/1/multipliers", R"([
        [], [1, 1], [1, 1, 1, 1], [0, 1, 1], [1, 1, 144115188075855872], [1, 18446744073709551615, 1], [1, -1, 1], [1, 1, 0.5],
        [9223372036854775807, 1, 1], [1, null, 1]
      ])"},
      {"/address/layers/1/primes", R"([
        [], [2, 3, 5], [2, 3, 5, 7, 11], [0, 3, 5, 7], [2, 3, 5, 2147483648], [2, 3, 5, 4294967298], [2, 3, -5, 7],
        [2, 3, 5, 18446744073709551615], [2, 3, "5", 7]
      ])"},
      {"/address/layers/1/offsets", R"([
        [], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2147483648], [0, 1, 2, 4294967296], [0, 1, 2, 18446744073709551615],
        [-1, 1, 2, 3], [0, 1, 2, []]
      ])"},
  };
  for (const auto& [key, values] : cases) {
    const std::string name = json::json_pointer(key).back();
    for (const json& value : json::parse(values)) {
      CAPTURE(key);
      CAPTURE(value.dump());
      const std::string message = package.error_with(key, value);
      // Other lengths and heads leave the lists of the wrong size, which are then what is named.
      const bool lists = (name == "ngram" && value >= 2 && value <= 8) || (name == "heads" && value >= 1 && value <= 4);
      check_names(message, "memory.address");
      check_names(message, !lists ? name : name == "ngram" ? "multipliers" : "primes");
    }
  }
}

TEST_CASE("n-grams: numbers of more or fewer layers than the memory has are an error") {
  const Package package;
  const json& layers = package.manifest["memory"]["address"]["layers"];
  for (const json& wrong : {json::array(), json::array({layers[0]}), json::array({layers[0], layers[1], layers[1]})}) {
    const std::string message = package.error_with("/address/layers", wrong);
    check_names(message, "memory.address.layers");
    check_names(message, "2 layers");
  }
  check_names(package.error_with("/layers", 3), "3 layers");
  // So many that a token's rows would not fit.
  check_names(package.error_with("/layers", 65535), "4096 rows");
}

TEST_CASE("n-grams: the canonical ids are a file of the package, of the stated size") {
  const Package package;
  json changed = package.manifest;
  changed["files"].erase("canonical_ids.bin");
  check_names(error_of<PackageError>([&] { package.open_with(changed); }), "canonical_ids.bin");
  changed = package.manifest;
  changed["files"]["canonical_ids.bin"]["bytes"] = 255;
  const Manifest manifest = package.open_with(changed);
  check_names(error_of<PackageError>([&] { manifest.check_files(); }), "canonical_ids.bin");
}

}  // namespace
}  // namespace meki
