// runtime/package: the member "qnn" of manifest.json, against docs/package-format.md; which files a run needs.

#include "runtime/base/error.h"
#include "runtime/engine/engine.h"
#include "runtime/package/manifest.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using nlohmann::json;
using test::check_names;
using test::error_of;
using test::TempDir;
using test::write_manifest;

// A package that is compiled for the chip "sm0001"; no file is a graph.
struct Compiled {
  Compiled() {
    manifest = test::write_package_files(dir.path());
    const std::filesystem::path root = dir.path() / "qnn" / "sm0001";
    std::filesystem::create_directories(root);
    json target = json::parse(R"({
      "chip": "A chip", "soc_model": 69, "htp_arch": 79, "precision": "float16", "context": 256, "chunk": 32,
      "embed": "embed.onnx", "head": "head.onnx",
      "decode": [{"file": "decode.0.onnx", "rows": null}, {"file": "decode.1.onnx", "rows": [0, 4]}],
      "prefill": [{"file": "prefill.0.onnx", "rows": null}, {"file": "prefill.1.onnx", "rows": [0, 4]}],
      "dense_decode": [{"file": "dense_decode.onnx", "rows": null}],
      "dense_prefill": [{"file": "dense_prefill.onnx", "rows": null}],
      "files": {}, "tools": {"onnxruntime": "1.0"}, "something else": [1, 2]
    })");
    for (const std::string name : {"embed.onnx", "embed.bin"}) add_file(target, root, name);
    for (const std::string stem :
         {"head", "decode.0", "decode.1", "prefill.0", "prefill.1", "dense_decode", "dense_prefill"}) {
      add_file(target, root, stem + ".onnx");
      add_file(target, root, stem + "_qnn.bin");
    }
    manifest["qnn"]["sm0001"] = target;
    write_manifest(dir.path(), manifest);
  }
  static void add_file(json& target, const std::filesystem::path& root, const std::string& name) {
    test::write_file(root / name, std::string_view(name));
    target["files"][name] = {{"bytes", name.size()}, {"sha256", std::string(64, '0')}};
  }
  json& target() { return manifest["qnn"]["sm0001"]; }
  // What Manifest::open says when the member at `pointer` of the target is `value`.
  std::string error_with(const std::string& pointer, const json& value) {
    json changed = manifest;
    changed[json::json_pointer("/qnn/sm0001" + pointer)] = value;
    return error_for(changed);
  }
  std::string error_for(const json& changed) const {
    write_manifest(dir.path(), changed);
    return error_of<PackageError>([this] { Manifest::open(dir.path()); });
  }
  std::filesystem::path file(const std::string& name) const { return dir.path() / "qnn" / "sm0001" / name; }

  TempDir dir;
  json manifest;
};

TEST_CASE("target: a valid one parses, and a package without any has none") {
  Compiled package;
  const Manifest manifest = Manifest::open(package.dir.path());
  REQUIRE(manifest.qnn.size() == 1);
  const QnnTarget& target = manifest.qnn.at("sm0001");
  CHECK(target.directory == package.dir.path() / "qnn" / "sm0001");
  CHECK(target.chip == "A chip");
  CHECK(target.precision == "float16");
  CHECK(target.soc_model == 69);
  CHECK(target.htp_arch == 79);
  CHECK(target.context == 256);
  CHECK(target.chunk == 32);
  CHECK(target.embed == "embed.onnx");
  CHECK(target.head == "head.onnx");
  REQUIRE(target.decode.size() == 2);
  CHECK(target.decode[1].file == "decode.1.onnx");
  CHECK_FALSE(target.decode[0].rows);
  REQUIRE(target.decode[1].rows);
  CHECK(target.decode[1].rows->last == 4);
  CHECK(target.prefill[1].file == "prefill.1.onnx");
  CHECK(target.dense_decode.at(0).file == "dense_decode.onnx");
  CHECK(target.dense_prefill.at(0).file == "dense_prefill.onnx");
  CHECK(target.files.at("decode.0_qnn.bin") == 16);

  package.target()["dense_decode"] = package.target()["dense_prefill"] = nullptr;
  write_manifest(package.dir.path(), package.manifest);
  CHECK(Manifest::open(package.dir.path()).qnn.at("sm0001").dense_decode.empty());
  package.manifest.erase("qnn");
  write_manifest(package.dir.path(), package.manifest);
  CHECK(Manifest::open(package.dir.path()).qnn.empty());
}

TEST_CASE("target: a missing key or a value of the wrong type is an error that names it") {
  Compiled package;
  const json wrong = json::parse(R"([-1, 1.5, 1e30, null, true, "", "not this", [], {}, [1], [{}]])");
  for (const std::string key : {"chip", "soc_model", "htp_arch", "precision", "context", "chunk", "embed", "decode",
                                "prefill", "head", "dense_decode", "dense_prefill", "files"}) {
    CAPTURE(key);
    json changed = package.manifest;
    changed["qnn"]["sm0001"].erase(key);
    check_names(package.error_for(changed), key);
    for (const json& value : wrong) {
      if (value.is_string() && (key == "chip" || key == "precision")) continue;  // for people: any text
      CAPTURE(value.dump());
      CHECK_FALSE(package.error_with("/" + key, value).empty());
    }
  }
  for (const json& value : wrong) {
    if (value.is_object()) continue;  // compiled for nothing
    json changed = package.manifest;
    changed["qnn"] = value;
    check_names(package.error_for(changed), "qnn");
  }
}

TEST_CASE("target: values outside their limits are errors that name their key") {
  Compiled package;
  const std::pair<const char*, const char*> cases[] = {
      {"soc_model", "[2147483648]"},
      {"htp_arch", "[0, 2147483648]"},
      {"context", "[0, 513]"},  // the model's is 512
      {"chunk", "[0, 257]"},
      {"embed", R"(["../embed.onnx", "a/b", "..", "/etc/passwd"])"},
      {"head", R"(["../head.onnx", "head.onnx\n"])"},
      {"decode", R"([[], [{"file": "decode.0.onnx"}], [{"file": "x", "rows": [0, 5]}], [{"file": "x", "rows": [1, 1]}],
                     [{"file": "../decode.0.onnx", "rows": null}]])"},
      {"prefill", R"([[], [{"file": "prefill.0.onnx", "rows": [0, 5]}]])"},
      {"dense_decode", R"([[], [{"file": "dense_decode.onnx", "rows": [0, 4]}]])"},
      {"dense_prefill", R"([null, [], [{"file": "dense_prefill.onnx", "rows": [0, 4]}]])"},
      {"files", R"([{"../x": {"bytes": 1}}, {"embed.onnx": {"bytes": -1}}])"},
  };
  for (const auto& [key, values] : cases) {
    for (const json& value : json::parse(values)) {
      CAPTURE(value.dump());
      check_names(package.error_with(std::string("/") + key, value), key);
    }
  }
}

TEST_CASE("target: prefill is cut as decode is") {
  Compiled package;
  for (const char* prefill :
       {R"([{"file": "prefill.1.onnx", "rows": [0, 4]}])",
        R"([{"file": "prefill.0.onnx", "rows": [0, 4]}, {"file": "prefill.1.onnx", "rows": null}])",
        R"([{"file": "prefill.0.onnx", "rows": null}, {"file": "prefill.1.onnx", "rows": [0, 3]}])",
        R"([{"file": "prefill.0.onnx", "rows": null}, {"file": "prefill.1.onnx", "rows": null}])"}) {
    CAPTURE(prefill);
    check_names(package.error_with("/prefill", json::parse(prefill)), "same rows as those of");
  }
}

TEST_CASE("target: in a package without a memory no stage takes rows, and there is no dense variant") {
  Compiled package;
  json& m = package.manifest;
  m["memory"] = m["dense_stages"] = nullptr;
  m["stages"][1]["rows"] = nullptr;
  check_names(package.error_for(m), "decode");
  package.target()["decode"][1]["rows"] = package.target()["prefill"][1]["rows"] = nullptr;
  check_names(package.error_for(m), "dense_decode");
  package.target()["dense_decode"] = package.target()["dense_prefill"] = nullptr;
  write_manifest(package.dir.path(), m);
  CHECK(Manifest::open(package.dir.path()).qnn.size() == 1);
}

TEST_CASE("target: a chip's name is no path") {
  Compiled package;
  for (const std::string name : {"", ".", "..", "../sm0001", "a/b", "SM0001", "sm 1", "sm_1", "sm0001\n"}) {
    CAPTURE(name);
    json changed = package.manifest;
    changed["qnn"][name] = package.target();
    check_names(package.error_for(changed), "qnn: a name");
  }
  check_names(package.error_for([&] {
    json changed = package.manifest;
    changed["qnn"][std::string(65, 'x')] = package.target();
    return changed;
  }()),
              "64");
}

TEST_CASE("target: a file that is named or belongs to a stage, and is not in \"files\", is an error that names it") {
  Compiled package;
  for (const auto& [name, entry] : package.target()["files"].items()) {
    if (name == "embed.bin") continue;  // an embedding may keep its table inside
    json changed = package.manifest;
    changed["qnn"]["sm0001"]["files"].erase(name);
    check_names(package.error_for(changed), "\"" + name + "\"");
  }
}

TEST_CASE("target: each run checks the files that it needs, and no others") {
  const auto damaged = [](const std::string& name) {
    auto package = std::make_unique<Compiled>();
    const bool compiled = package->target()["files"].contains(name);
    const std::filesystem::path path = compiled ? package->file(name) : package->dir / name;
    REQUIRE(std::filesystem::remove(path));
    return package;
  };
  for (const std::string name : {"stage0.onnx", "weights.bin", "tokenizer.json"}) {
    const auto package = damaged(name);
    const Manifest manifest = Manifest::open(package->dir.path());
    check_names(error_of<PackageError>([&] { manifest.check_files(); }), name);
    CHECK_NOTHROW(manifest.check_target_files("sm0001"));
  }
  for (const std::string name : {"embed.bin", "decode.0.onnx", "prefill.1_qnn.bin", "head_qnn.bin"}) {
    const auto package = damaged(name);
    const Manifest manifest = Manifest::open(package->dir.path());
    CHECK_NOTHROW(manifest.check_files());
    check_names(error_of<PackageError>([&] { manifest.check_target_files("sm0001"); }), package->file(name).string());
  }
  const auto package = damaged("memory.rom");
  const Manifest manifest = Manifest::open(package->dir.path());
  check_names(error_of<PackageError>([&] { manifest.check_files(); }), "memory.rom");
  check_names(error_of<PackageError>([&] { manifest.check_target_files("sm0001"); }), "memory.rom");
  const Compiled canonical;
  Manifest ngrams = Manifest::open(canonical.dir.path());
  ngrams.memory->ngrams.canonical = "canonical_ids.bin";
  ngrams.files["canonical_ids.bin"] = 4;
  check_names(error_of<PackageError>([&] { ngrams.check_target_files("sm0001"); }), "canonical_ids.bin");
  test::write_file(canonical.dir / "canonical_ids.bin", std::string_view("four"));
  CHECK_NOTHROW(ngrams.check_target_files("sm0001"));
  const Compiled other;
  test::write_file(other.file("head.onnx"), std::string_view("longer than it was"));
  check_names(error_of<PackageError>([&] { Manifest::open(other.dir.path()).check_target_files("sm0001"); }),
              "head.onnx");
}

TEST_CASE("target: a chip that the package is not compiled for is an error with those that it is") {
  Compiled package;
  const std::string path = package.dir.path().string();
  const auto error_for = [&](const std::string& soc) {
    write_manifest(package.dir.path(), package.manifest);
    const Manifest manifest = Manifest::open(package.dir.path());
    return error_of<std::invalid_argument>([&] { manifest.find_target(soc); });
  };
  CHECK(Manifest::open(package.dir.path()).find_target("") == "sm0001");
  CHECK(Manifest::open(package.dir.path()).find_target("sm0001") == "sm0001");
  check_names(error_for("sm9"), "only for sm0001");
  check_names(error_for("sm9"), "run meki-compile " + path + " --soc sm9");
  package.manifest["qnn"]["sm0002"] = package.target();
  check_names(error_for(""), "sm0001, sm0002");
  package.manifest.erase("qnn");
  check_names(error_for(""), "not compiled for any chip");
  check_names(error_for(""), "run meki-compile " + path + " --soc ");
}

TEST_CASE("target: options that do not fit what is compiled are errors before anything is loaded") {
  constexpr const char* kLibrary = "libm.so.6";  // which is not ONNX Runtime
  Compiled package;
  const auto error_for = [&](const EngineOptions& options) {
    return error_of<std::invalid_argument>([&] { Engine::open(package.dir.path(), options); });
  };
  for (const KvType type : {KvType::float32, KvType::int8, KvType::int4}) {
    check_names(error_for({.onnxruntime = kLibrary, .kv_type = type, .provider = Provider::qnn}), "expected float16");
  }
  check_names(error_for({.onnxruntime = kLibrary, .provider = Provider::qnn, .soc = "sm9"}), "meki-compile");
  check_names(error_for({.onnxruntime = kLibrary, .soc = "sm0001"}), "qnn");
  package.target()["dense_decode"] = package.target()["dense_prefill"] = nullptr;
  write_manifest(package.dir.path(), package.manifest);
  check_names(error_for({.onnxruntime = kLibrary, .memory = false, .provider = Provider::qnn}),
              "run meki-compile " + package.dir.path().string() + " --soc sm0001 --dense");
}

}  // namespace
}  // namespace meki
