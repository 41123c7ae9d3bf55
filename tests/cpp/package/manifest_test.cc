// runtime/package: manifest.json, against docs/package-format.md.

#include "runtime/package/manifest.h"

#include <array>
#include <random>

#include "runtime/base/error.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using nlohmann::json;
using test::check_names;
using test::error_of;
using test::TempDir;
using test::write_manifest;

// A valid package in a directory of its own; `manifest` is what is on disk.
struct Package {
  Package() {
    std::filesystem::create_directory(path);
    manifest = test::write_package_files(path);
    write_manifest(path, manifest);
  }
  // What is said to `changed` by whoever opens the package to run it on the CPU.
  std::string error_with(const json& changed) const {
    write_manifest(path, changed);
    return error_of<PackageError>([this] { Manifest::open(path).check_files(); });
  }
  std::string error_with_text(std::string_view text) const {
    test::write_file(path / "manifest.json", text);
    return error_of<PackageError>([this] { Manifest::open(path); });
  }

  TempDir dir;
  std::filesystem::path path = dir / "package";
  json manifest;
};

// What the runtime needs of a manifest: JSON pointers.
constexpr const char* kNeeded[] = {
    "/format",
    "/version",
    "/name",
    "/architecture",
    "/architecture/vocab_size",
    "/architecture/layers",
    "/architecture/hidden",
    "/architecture/ffn",
    "/architecture/heads",
    "/architecture/kv_heads",
    "/architecture/head_dim",
    "/architecture/context",
    "/memory",
    "/memory/kind",
    "/memory/address",
    "/memory/address/kind",
    "/memory/layers",
    "/memory/row_dim",
    "/memory/file",
    "/memory/row_type",
    "/memory/content_id",
    "/stages",
    "/stages/0/file",
    "/stages/0/rows",
    "/stages/1/rows",
    "/dense_stages",
    "/dense_stages/0/file",
    "/weights",
    "/weights/type",
    "/tokenizer",
    "/tokenizer/file",
    "/tokenizer/eos_token_ids",
    "/tokenizer/chat_template",
    "/tokenizer/chat_template/file",
    "/files",
    "/files/memory.rom",
    "/files/stage1.onnx/bytes",
};

TEST_CASE("manifest: caches of keys and values that differ by layer") {
  Package package;
  const json own = {{"kv_heads", 1}, {"head_dim", 32}, {"window", 100}};
  const json full = {{"kv_heads", 3}, {"head_dim", 64}, {"window", 0}};
  package.manifest["kv_caches"] = {own, full, {{"shared", 0}}, {{"shared", 1}}};
  test::write_file(package.path / "manifest.json", package.manifest.dump());
  const std::vector<KvCacheInfo> caches = Manifest::open(package.path).architecture.kv_caches;
  REQUIRE(caches.size() == 4);
  for (const size_t layer : {0, 2}) {
    CHECK(std::array{caches[layer].kv_heads, caches[layer].head_dim, caches[layer].window} ==
          std::array<uint32_t, 3>{1, 32, 100});
  }
  CHECK(std::array{caches[3].kv_heads, caches[3].head_dim, caches[3].window} == std::array<uint32_t, 3>{3, 64, 0});
  CHECK_FALSE(caches[1].shared);
  CHECK(caches[2].shared == 0);
  CHECK(caches[3].shared == 1);

  const auto refuse = [&package](const json& wrong, const std::string& what) {
    json changed = package.manifest;
    changed["kv_caches"] = wrong;
    check_names(package.error_with(changed), what);
  };
  refuse(json::array({own, own, own}), "one for each of 4 layers");
  refuse(7, "kv_caches is 7, expected an array");
  refuse({own, own, own, {{"shared", 3}}}, "kv_caches[3].shared is 3, expected an earlier layer");
  refuse({own, own, {{"shared", 0}}, {{"shared", 2}}}, "kv_caches[3].shared is 2, expected an earlier layer");
  refuse({{{"shared", 0}}, own, own, own}, "kv_caches[0].shared is 0, expected an earlier layer");
  for (const char* key : {"kv_heads", "head_dim"}) {
    json wrong = own;
    wrong[key] = 0;
    refuse({own, wrong, own, own}, std::string("kv_caches[1].") + key + " is 0, expected an integer from 1");
  }
  json wrong = own;
  wrong["window"] = -1;
  refuse({own, wrong, own, own}, "kv_caches[1].window is -1");
}

TEST_CASE("manifest: a valid one parses") {
  const Package package;
  const Manifest manifest = Manifest::open(package.path);
  CHECK(manifest.directory == package.path);
  CHECK(manifest.name == "test");
  CHECK(json::parse(manifest.json) == package.manifest);
  const Architecture& a = manifest.architecture;
  CHECK(std::array{a.vocab_size, a.layers, a.hidden, a.context} == std::array<uint32_t, 4>{64, 4, 8, 512});
  REQUIRE(a.kv_caches.size() == 4);
  for (const KvCacheInfo& cache : a.kv_caches) {
    CHECK(std::array{cache.kv_heads, cache.head_dim, cache.window} == std::array<uint32_t, 3>{2, 16, 0});
    CHECK_FALSE(cache.shared);
  }
  REQUIRE(manifest.memory);
  CHECK(manifest.memory->address == "token");
  CHECK(manifest.memory->vocab_size == manifest.architecture.vocab_size);
  CHECK(manifest.memory->layers == 4);
  CHECK(manifest.memory->row_dim == 16);
  CHECK(manifest.memory->file == "memory.rom");
  CHECK(manifest.memory->row_type == "int8");
  CHECK(manifest.memory->content_id == test::RomImage::kContentId);
  REQUIRE(manifest.stages.size() == 2);
  CHECK(manifest.stages[0].file == "stage0.onnx");
  CHECK_FALSE(manifest.stages[0].rows);
  CHECK(manifest.stages[1].file == "stage1.onnx");
  REQUIRE(manifest.stages[1].rows);
  CHECK(manifest.stages[1].rows->first == 0);
  CHECK(manifest.stages[1].rows->last == 4);
  REQUIRE(manifest.dense_stages.size() == 1);
  CHECK(manifest.dense_stages[0].file == "dense.onnx");
  CHECK_FALSE(manifest.dense_stages[0].rows);
  CHECK(manifest.weight_type == "int8");
  CHECK(manifest.eos_token_ids == std::vector<int32_t>{0, 63});
}

TEST_CASE("manifest: a table may have fewer entries than the model has tokens") {
  Package package;
  const auto entries = [&package](const json& value) {
    json changed = package.manifest;
    changed["memory"]["address"]["vocab_size"] = value;
    return changed;
  };
  write_manifest(package.path, entries(5));
  CHECK(Manifest::open(package.path).memory->vocab_size == 5);
  for (const json& value : {json(0), json(-1), json(65), json("5")}) {
    check_names(package.error_with(entries(value)), "memory.address.vocab_size");
  }
}

TEST_CASE("manifest: a dense one has no memory and no rows") {
  Package package;
  package.manifest["memory"] = nullptr;
  check_names(package.error_with(package.manifest), "rows");
  package.manifest["stages"][1]["rows"] = nullptr;
  check_names(package.error_with(package.manifest), "dense_stages");
  package.manifest["dense_stages"] = nullptr;
  write_manifest(package.path, package.manifest);
  CHECK_FALSE(Manifest::open(package.path).memory);
  package.manifest["dense_stages"] = json::array({{{"file", "dense.onnx"}}});
  check_names(package.error_with(package.manifest), "memory");
}

TEST_CASE("manifest: a model needs no chat template") {
  Package package;
  package.manifest["tokenizer"]["chat_template"] = nullptr;
  package.manifest["files"].erase("chat_template.jinja");
  write_manifest(package.path, package.manifest);
  CHECK(Manifest::open(package.path).eos_token_ids == std::vector<int32_t>{0, 63});
}

TEST_CASE("manifest: a missing key is an error that names it") {
  const Package package;
  for (const std::string needed : kNeeded) {
    CAPTURE(needed);
    const json::json_pointer pointer(needed);
    json changed = package.manifest;
    changed[pointer.parent_pointer()].erase(pointer.back());
    const std::string message = package.error_with(changed);
    check_names(message, pointer.back());
    check_names(message, (package.path / "manifest.json").string());
  }
}

TEST_CASE("manifest: a value of the wrong type is an error that names its key") {
  const Package package;
  const json wrong = json::parse(R"([
    -1, -9223372036854775807, 1.5, 1e30, 18446744073709551616, null, true, "not a name", "", [], {}
  ])");
  for (const std::string needed : kNeeded) {
    const json::json_pointer pointer(needed);
    for (const json& value : wrong) {
      const json& good = package.manifest[pointer];
      if (value.type() == good.type()) continue;  // right type: other tests
      if ((pointer.back() == "rows" || pointer.back() == "chat_template") && value.is_null()) continue;  // may be null
      CAPTURE(needed);
      CAPTURE(value.dump());
      json changed = package.manifest;
      changed[pointer] = value;
      check_names(package.error_with(changed), pointer.back());
    }
  }
  for (const char* text : {"null", "1", "\"{}\"", "[]"}) check_names(package.error_with_text(text), "manifest.json");
}

TEST_CASE("manifest: values outside their limits are errors that name their key") {
  const Package package;
  const std::pair<const char*, const char*> cases[] = {
      // a key, and an array of wrong values
      {"/format", R"(["", "meki", "meki-package "])"},
      {"/version", "[0, 1, 2, 3, 4, 7, 4294967301]"},
      {"/architecture/vocab_size", "[0, 2147483648, 18446744073709551615]"},
      {"/architecture/layers", "[0, 65536, 4294967300]"},
      {"/architecture/hidden", "[0, 1048577, 4294967304]"},
      {"/architecture/ffn", "[0, 1048577]"},
      {"/architecture/heads", "[0, 1048577]"},
      {"/architecture/kv_heads", "[0, 1048577]"},
      {"/architecture/head_dim", "[0, 1048577]"},
      {"/memory/layers", "[0, 65536]"},
      {"/memory/row_dim", "[0, 1048577]"},
      {"/architecture/context", "[0, 2147483648]"},
      {"/stages", "[[]]"},
      {"/stages/1/rows", R"([[], [0], [0, 1, 2], [1, 1], [2, 1], [0, 5], [4, 5], [-1, 2], [0, 4294967298], [0, "4"]])"},
      {"/dense_stages", "[[], null]"},
      {"/tokenizer/eos_token_ids", "[[64], [0, -1], [0.5], [null], [4294967296]]"},
      {"/files/stage1.onnx/bytes", "[9223372036854775808]"},
  };
  for (const auto& [key, values] : cases) {
    const json::json_pointer pointer(key);
    for (const json& value : json::parse(values)) {
      CAPTURE(pointer.to_string());
      CAPTURE(value.dump());
      json changed = package.manifest;
      changed[pointer] = value;
      check_names(package.error_with(changed), pointer.back());
    }
  }
  json changed = package.manifest;
  changed["memory"]["layers"] = 3;  // right by itself, but a stage takes the rows of layer 3
  check_names(package.error_with(changed), "rows");
  for (const int bytes : {0, 10, 12}) {
    changed = package.manifest;
    changed["files"]["stage1.onnx"]["bytes"] = bytes;
    const std::string message = package.error_with(changed);
    check_names(message, "stage1.onnx");
    check_names(message, std::to_string(bytes));
    check_names(message, "11");
  }
}

TEST_CASE("manifest: a file name that is not a plain one is refused, even if the file is there") {
  const Package package;
  test::write_file(package.dir / "outside", std::string_view("stage1.onnx"));
  std::filesystem::create_directory(package.path / "a");
  test::write_file(package.path / "a" / "b", std::string_view("stage1.onnx"));
  const std::string absolute = (package.dir / "outside").string();
  const std::string names[] = {
      "",   ".",   "..",     "../outside",           absolute,        "/etc/passwd",   "a/b",     "a\\b",
      "a/", "./a", "a/../b", std::string("a\0b", 3), "stage1.onnx\n", "\x1B[2Jescape", "del\x7F", std::string(256, 'x'),
  };
  for (const std::string& name : names) {
    CAPTURE(name);
    for (const char* key : {"/memory/file", "/stages/1/file", "/tokenizer/file", "/tokenizer/chat_template/file"}) {
      json changed = package.manifest;
      changed["files"][name]["bytes"] = 11;
      changed[json::json_pointer(key)] = name;
      check_names(package.error_with(changed), "file");
    }
    json changed = package.manifest;
    changed["files"][name]["bytes"] = 11;
    const std::string message = package.error_with(changed);
    check_names(message, "files");
    // Nor does a message carry a control character to a terminal.
    CHECK(std::none_of(message.begin(), message.end(), [](char c) { return static_cast<unsigned char>(c) < 32; }));
  }
}

TEST_CASE("manifest: a named file that is not in \"files\" is an error that names it") {
  const Package package;
  for (const char* name : {"stage0.onnx", "stage1.onnx", "memory.rom", "tokenizer.json", "chat_template.jinja"}) {
    json changed = package.manifest;
    changed["files"].erase(name);
    check_names(package.error_with(changed), name);
  }
}

TEST_CASE("manifest: files that are missing, of another size, or no files are errors that name them") {
  const auto damaged = [](const std::string& name, auto damage) {
    const Package package;
    damage(package.path / name);
    check_names(error_of<PackageError>([&] { Manifest::open(package.path).check_files(); }),
                (package.path / name).string());
  };
  using std::filesystem::path;
  for (const std::string name : {"manifest.json", "memory.rom", "stage0.onnx", "weights.bin", "tokenizer.json"}) {
    CAPTURE(name);
    damaged(name, [](const path& file) { std::filesystem::remove(file); });
    damaged(name, [](const path& file) {
      std::filesystem::remove(file);
      test::make_fifo(file);  // must not wait for a writer
    });
    damaged(name, [](const path& file) {
      std::filesystem::remove(file);
      std::filesystem::create_directory(file);
    });
    damaged(name, [](const path& file) {
      std::filesystem::remove(file);
      std::filesystem::create_directory_symlink(file.parent_path(), file);
    });
    damaged(name, [](const path& file) {
      std::filesystem::remove(file);
      std::filesystem::create_symlink(file.parent_path() / "nowhere", file);
    });
    damaged(name, [](const path& file) { test::write_file(file, std::string_view()); });
  }
  damaged("weights.bin", [](const path& file) { test::write_file(file, std::string_view("weights.bin+")); });
  const TempDir empty;
  check_names(error_of<PackageError>([&] { Manifest::open(empty.path()); }), "manifest.json");
  check_names(error_of<PackageError>([&] { Manifest::open(empty / "missing"); }), "missing");
}

TEST_CASE("manifest: what is not JSON, or too much of it, is an error that names the file") {
  const Package package;
  const std::string valid = package.manifest.dump();
  for (const std::string& text :
       {std::string(), std::string("  "), std::string("{"), std::string("{'format': 1}"), valid.substr(0, 200),
        valid + "}", std::string("\0\0", 2), std::string("{\"format\": \"\xFF\xFE\"}"), std::string("NaN")}) {
    CAPTURE(text);
    check_names(package.error_with_text(text), "manifest.json");
  }
  const size_t limit = 16 << 20;
  test::write_file(package.path / "manifest.json", std::string_view(valid + std::string(limit - valid.size(), ' ')));
  CHECK_NOTHROW(Manifest::open(package.path));
  check_names(package.error_with_text(valid + std::string(limit - valid.size() + 1, ' ')), "manifest.json");
}

TEST_CASE("manifest: nesting without end overflows no stack") {
  const Package package;
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  const std::string rest = "," + package.manifest.dump().substr(1);
  for (const size_t depth : {1000U, 100'000U, 4'000'000U}) {
    CAPTURE(depth);
    check_names(package.error_with_text(std::string(depth, '[')), "manifest.json");
    check_names(package.error_with_text(nested(depth)), "manifest.json");
    for (const char* key : {"format", "architecture", "provenance", "unknown"}) {
      check_names(package.error_with_text(R"({")" + std::string(key) + R"(":)" + nested(depth) + rest),
                  "manifest.json");
    }
  }
  // What people write into the parts that are for people is theirs.
  test::write_file(package.path / "manifest.json", std::string_view(R"({"unknown":)" + nested(20) + rest));
  CHECK_NOTHROW(Manifest::open(package.path));
}

TEST_CASE("manifest: random damage either parses or is a PackageError") {
  const Package package;
  const std::string valid = package.manifest.dump();
  std::mt19937 random(11);
  int refused = 0;
  constexpr int kRounds = 3000;
  for (int round = 0; round < kRounds; ++round) {
    std::string text = valid;
    for (auto change = 1 + random() % 3; change > 0; --change) {
      const size_t at = random() % text.size();
      switch (random() % 4) {
        case 0: text[at] = static_cast<char>(random()); break;
        case 1: text[at] = "\"{}[]:,0-9e.\\"[random() % 13]; break;
        case 2: text.erase(at, 1 + random() % 8); break;
        default: text.insert(at, text.substr(random() % text.size(), 1 + random() % 8)); break;
      }
    }
    test::write_file(package.path / "manifest.json", std::string_view(text));
    CAPTURE(text);
    try {
      const Manifest manifest = Manifest::open(package.path);
      CHECK(manifest.json == text);
      CHECK_FALSE(manifest.stages.empty());
    } catch (const PackageError&) {  // anything else fails the test
      ++refused;
    }
  }
  // The damage is neither all harmless nor all fatal: both ways were taken.
  CHECK(refused > kRounds / 2);
  CHECK(refused < kRounds);
}

}  // namespace
}  // namespace meki
