// runtime/engine: whether stages and manifest fit together.

#include "runtime/engine/engine.h"

#include "runtime/base/error.h"
#include "runtime/executor/stage_io.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::FakeGraph;
using test::TempDir;
using Names = std::vector<std::string>;

struct GraphNames {
  Names inputs;
  Names outputs;
};

// The names of a valid model of two layers in two stages; tests spoil one thing each.
struct Names2 {
  GraphNames first = {{"token_ids", "total_sequence_length", "past.0"}, {"middle", "present.0"}};
  GraphNames second = {{"middle", "rows", "total_sequence_length", "past.1", "logit_index"}, {"logits", "present.1"}};
  bool first_rows = false;
  bool second_rows = true;

  Names check() const {
    Manifest manifest;
    manifest.directory = "package";
    manifest.architecture = {
        .vocab_size = 8, .layers = 2, .hidden = 4, .kv_heads = 1, .head_dim = 2, .memory_dim = 4, .context = 16};
    const auto rows = [](bool some) { return some ? std::optional(LayerRange{0, 2}) : std::nullopt; };
    manifest.stages = {{"a.onnx", rows(first_rows)}, {"b.onnx", rows(second_rows)}};
    std::vector<Stage> stages;
    stages.push_back({std::make_unique<FakeGraph>(first.inputs, first.outputs), rows(first_rows)});
    stages.push_back({std::make_unique<FakeGraph>(second.inputs, second.outputs), rows(second_rows)});
    return check_stages(manifest, stages);
  }
};

void replace(Names& names, const std::string& name, const Names& by) {
  REQUIRE(std::erase(names, name) == 1);
  names.insert(names.end(), by.begin(), by.end());
}

TEST_CASE("stages: names tell what an input or output is") {
  CHECK(parse_input("token_ids").kind == IoKind::token_ids);
  CHECK(parse_input("total_sequence_length").kind == IoKind::total_sequence_length);
  CHECK(parse_input("rows").kind == IoKind::rows);
  CHECK(parse_input("logit_index").kind == IoKind::logit_index);
  CHECK(parse_input("past.12").kind == IoKind::cache);
  CHECK(parse_input("past.12").layer == 12);
  CHECK(parse_output("logits").kind == IoKind::logits);
  CHECK(parse_output("present.3").kind == IoKind::cache);
  CHECK(parse_output("present.3").layer == 3);
  for (const std::string name : {"logits", "present.0", "past.x", "past.", "past.1.key", "past1", "past.-1",
                                 "past.99999999999", "past.1 ", "Rows", ""}) {
    CAPTURE(name);
    CHECK(parse_input(name).kind == IoKind::hidden);
  }
  for (const std::string name : {"rows", "token_ids", "past.0", "present.0.key", "present."}) {
    CAPTURE(name);
    CHECK(parse_output(name).kind == IoKind::hidden);
  }
}

TEST_CASE("stages: those that fit give the names that pass between them") {
  CHECK(Names2().check() == Names{"middle"});
}

TEST_CASE("stages: graphs that do not fit are errors that name the file") {
  struct Case {
    std::string what;
    const char* file;  // that the message names
    void (*spoil)(Names2& names);
  };
  const Case cases[] = {
      {"an unknown input", "b.onnx", [](Names2& n) { n.second.inputs.push_back("mystery"); }},
      {"a hidden input that only a later stage makes", "a.onnx",
       [](Names2& n) {
         n.first.inputs.push_back("late");
         n.second.outputs.push_back("late");
       }},
      {"a hidden input that the stage makes itself", "b.onnx",
       [](Names2& n) {
         n.second.inputs.push_back("own");
         n.second.outputs.push_back("own");
       }},
      {"no cache in", "b.onnx", [](Names2& n) { std::erase(n.second.inputs, "past.1"); }},
      {"no cache out", "b.onnx", [](Names2& n) { std::erase(n.second.outputs, "present.1"); }},
      {"a layer without a cache", "b.onnx",
       [](Names2& n) {
         std::erase(n.first.inputs, "past.0");
         std::erase(n.first.outputs, "present.0");
       }},
      {"a cache of two stages", "b.onnx",
       [](Names2& n) {
         n.second.inputs.push_back("past.0");
         n.second.outputs.push_back("present.0");
       }},
      {"a cache of a layer that is not there", "b.onnx",
       [](Names2& n) {
         replace(n.second.inputs, "past.1", {"past.2"});
         replace(n.second.outputs, "present.1", {"present.2"});
       }},
      {"a cache that one stage reads and another one writes", ".onnx",
       [](Names2& n) {
         std::erase(n.second.outputs, "present.1");
         n.first.outputs.push_back("present.1");
       }},
      {"one cache under two names", ".onnx",
       [](Names2& n) {
         n.second.inputs.push_back("past.01");
         n.second.outputs.push_back("present.01");
       }},
      {"no logits", "b.onnx", [](Names2& n) { std::erase(n.second.outputs, "logits"); }},
      {"logits of two stages", ".onnx", [](Names2& n) { n.first.outputs.push_back("logits"); }},
      {"rows that the manifest does not give", "a.onnx", [](Names2& n) { n.first.inputs.push_back("rows"); }},
      {"rows that the manifest gives and the graph does not take", "b.onnx",
       [](Names2& n) { std::erase(n.second.inputs, "rows"); }},
      {"rows in the manifest of the other stage", ".onnx", [](Names2& n) { std::swap(n.first_rows, n.second_rows); }},
  };
  for (const Case& spoilt : cases) {
    CAPTURE(spoilt.what);
    Names2 names;
    spoilt.spoil(names);
    std::string message = "no error";
    CHECK_NOTHROW(try { names.check(); } catch (const PackageError& error) { message = error.what(); });
    check_names(message, spoilt.file);
  }
}

TEST_CASE("engine: opening a package") {
  const TempDir dir;
  test::write_manifest(dir.path(), test::write_package_files(dir.path()));
  check_names(error_of<std::runtime_error>([&] { Engine::open(dir.path(), {.onnxruntime = dir / "missing.so"}); }),
              "missing.so");
  // A library, but not of ONNX Runtime.
  CHECK_THROWS_AS(Engine::open(dir.path(), {.onnxruntime = "libm.so.6"}), std::runtime_error);
  for (const int threads : {-1, 1'000'000}) {
    check_names(error_of<std::invalid_argument>(
                    [&] { Engine::open(dir.path(), {.onnxruntime = "libm.so.6", .threads = threads}); }),
                "threads");
  }
  check_names(error_of<PackageError>([&] { Engine::open(dir / "missing", {.onnxruntime = "libm.so.6"}); }), "missing");
}

}  // namespace
}  // namespace meki
