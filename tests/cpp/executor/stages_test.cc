// runtime/executor/stages: whether stages and manifest fit together.

#include "runtime/executor/stages.h"

#include "runtime/base/error.h"
#include "runtime/executor/dynamic.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::FakeGraph;
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
  std::vector<KvCacheInfo> caches = {2, {.kv_heads = 2, .head_dim = 16}};

  std::vector<Stage> stages() const {
    const auto rows = [](bool some) { return some ? std::optional(LayerRange{0, 2}) : std::nullopt; };
    std::vector<Stage> stages;
    stages.push_back({std::make_unique<FakeGraph>(first.inputs, first.outputs), rows(first_rows), "package/a.onnx"});
    stages.push_back({std::make_unique<FakeGraph>(second.inputs, second.outputs), rows(second_rows), "package/b.onnx"});
    return stages;
  }
  Names check() const { return check_stages(kDynamicNames, stages(), caches); }
};

// A convolution's cache as an input and an output.
void add_convolution(GraphNames& names, const std::string& layer) {
  names.inputs.push_back("past_convolution." + layer);
  names.outputs.push_back("present_convolution." + layer);
}

void replace(Names& names, const std::string& name, const Names& by) {
  REQUIRE(std::erase(names, name) == 1);
  names.insert(names.end(), by.begin(), by.end());
}

TEST_CASE("stages: names tell what an input or output is") {
  CHECK(kDynamicNames.input("token_ids").kind == IoKind::token_ids);
  CHECK(kDynamicNames.input("total_sequence_length").kind == IoKind::total_sequence_length);
  CHECK(kDynamicNames.input("rows").kind == IoKind::rows);
  CHECK(kDynamicNames.input("logit_index").kind == IoKind::logit_index);
  CHECK(kDynamicNames.input("past.12").kind == IoKind::cache);
  CHECK(kDynamicNames.input("past.12").layer == 12);
  CHECK(kDynamicNames.output("logits").kind == IoKind::logits);
  CHECK(kDynamicNames.output("present.3").kind == IoKind::cache);
  CHECK(kDynamicNames.output("present.3").layer == 3);
  CHECK(kDynamicNames.input("past_convolution.4").kind == IoKind::convolution);
  CHECK(kDynamicNames.input("past_convolution.4").layer == 4);
  CHECK(kDynamicNames.output("present_convolution.5").kind == IoKind::convolution);
  CHECK(kDynamicNames.output("present_convolution.5").layer == 5);
  for (const std::string name :
       {"logits", "present.0", "past.x", "past.", "past.1.key", "past1", "past.-1", "past.99999999999", "past.1 ",
        "Rows", "", "present_convolution.0", "past_convolution.", "past_convolution.x", "past_convolution"}) {
    CAPTURE(name);
    CHECK(kDynamicNames.input(name).kind == IoKind::hidden);
  }
  for (const std::string name : {"rows", "token_ids", "past.0", "present.0.key", "present.", "past_convolution.0"}) {
    CAPTURE(name);
    CHECK(kDynamicNames.output(name).kind == IoKind::hidden);
  }
}

TEST_CASE("stages: those that fit give the names that pass between them") {
  CHECK(Names2().check() == Names{"middle"});
}

TEST_CASE("stages: a layer may see the cache of a layer of an earlier stage in place of one of its own") {
  Names2 names;
  names.caches[1].shared = 0;
  replace(names.second.inputs, "past.1", {"shared.0"});
  replace(names.second.outputs, "present.1", {});
  CHECK(names.check() == Names{"middle"});
  CHECK(kDynamicNames.input("shared.0").kind == IoKind::seen_cache);
  CHECK(kDynamicNames.output("shared.0").kind == IoKind::hidden);

  const auto refuse = [](const Names2& wrong, const std::string& what) {
    test::check_names(test::error_of<PackageError>([&wrong] { wrong.check(); }), what);
  };
  Names2 own = names;
  own.second.inputs.push_back("past.1");
  own.second.outputs.push_back("present.1");
  refuse(own, "\"past.1\" is of a layer without a cache of its own");
  Names2 nobodys = names;
  replace(nobodys.second.inputs, "shared.0", {"shared.1"});
  refuse(nobodys, "\"shared.1\" is the cache of no earlier stage");
  Names2 early = names;
  early.first.inputs.push_back("shared.0");
  refuse(early, "\"shared.0\" is the cache of no earlier stage");
}

TEST_CASE("stages: the memory's first layers may have convolutions, in whatever stage") {
  const auto count = [](const Names2& names) {
    CHECK(names.check() == Names{"middle"});
    CHECK(count_states(kDynamicNames, names.stages(), IoKind::cache) == 2);
    return count_states(kDynamicNames, names.stages(), IoKind::convolution);
  };
  CHECK(count({}) == 0);
  for (const bool swapped : {false, true}) {
    Names2 names;
    add_convolution(swapped ? names.second : names.first, "0");
    CHECK(count(names) == 1);
    add_convolution(swapped ? names.first : names.second, "1");
    CHECK(count(names) == 2);
  }
  Names2 names;
  add_convolution(names.second, "1");
  add_convolution(names.second, "0");
  CHECK(count(names) == 2);
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
      {"a convolution without one before it", ".onnx", [](Names2& n) { add_convolution(n.second, "1"); }},
      {"a convolution of a layer that is not there", "a.onnx",
       [](Names2& n) {
         for (const char* layer : {"0", "1", "2"}) add_convolution(n.first, layer);
       }},
      {"no convolution out", "b.onnx", [](Names2& n) { n.second.inputs.push_back("past_convolution.0"); }},
      {"no convolution in", "b.onnx", [](Names2& n) { n.second.outputs.push_back("present_convolution.0"); }},
      {"a convolution that one stage reads and another one writes", ".onnx",
       [](Names2& n) {
         n.first.inputs.push_back("past_convolution.0");
         n.second.outputs.push_back("present_convolution.0");
       }},
      {"a convolution of two stages", "b.onnx",
       [](Names2& n) {
         add_convolution(n.first, "0");
         add_convolution(n.second, "0");
       }},
      {"one convolution under two names", "b.onnx",
       [](Names2& n) {
         add_convolution(n.second, "0");
         add_convolution(n.second, "00");
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

}  // namespace
}  // namespace meki
