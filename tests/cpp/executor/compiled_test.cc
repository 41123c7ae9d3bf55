// runtime/executor/compiled: sessions of a model that is compiled for a chip, and whether its stages fit the manifest.

#include "runtime/executor/compiled.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>

#include "runtime/base/error.h"
#include "runtime/base/half.h"
#include "runtime/engine/session.h"
#include "runtime/executor/compiled_kv_cache.h"
#include "tests/cpp/allocations.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_compiled.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeCompiledModel::Kind;
using Strings = std::vector<std::string>;

constexpr Kind kKinds[] = {Kind::dense, Kind::two_stages, Kind::three_stages};

Ids ids_up_to(size_t count) {
  Ids ids;
  for (size_t i = 0; i < count; ++i) ids.push_back(static_cast<int64_t>((i * 11 + i / 5) % FakeCompiledModel::kVocab));
  return ids;
}

TEST_CASE("compiled: a padded prefill, single tokens and any mixture of them give the same logits") {
  for (const Kind kind : kKinds) {
    const FakeCompiledModel model(kind);
    for (const bool prefetch : {true, false}) {
      // Steps of 4 tokens at most: whole chunks, a rest of 1 (the decode graph), of 2 and of 3, and the full context,
      // where a step's padding would lie behind the cache.
      for (const Ids& sizes : {Ids{1}, Ids{4}, Ids{5}, Ids{10}, Ids{11}, Ids{1, 1, 1}, Ids{3, 1, 6, 2}, Ids{22, 2},
                               Ids{21, 3}, Ids{24}, Ids{1, 23}}) {
        Session session(model.engine, {.prefetch = prefetch});
        const Ids all = ids_up_to(FakeCompiledModel::kContext);
        size_t done = 0;
        for (const int64_t size : sizes) {
          const auto first = all.begin() + static_cast<std::ptrdiff_t>(done);
          session.append(Ids(first, first + size));
          done += static_cast<size_t>(size);
          CHECK(pending_logits(session) ==
                expected_logits(model, Ids(all.begin(), first + size), done - static_cast<size_t>(size)));
        }
        // The last token once more, over a cache that padding at its end would have spoilt.
        session.rewind(done - 1);
        session.append(Ids{all[done - 1]});
        const Ids sequence(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(done));
        CHECK(pending_logits(session) == expected_logits(model, sequence, done - 1));
      }
    }
  }
}

TEST_CASE("compiled: generation goes on to the end of the context") {
  for (const Kind kind : kKinds) {
    const FakeCompiledModel model(kind);
    Session session(model.engine, {});
    CHECK(session.context() == FakeCompiledModel::kContext);
    session.append(kPrompt);
    session.start(kGreedy, 0);
    const size_t room = FakeCompiledModel::kContext - kPrompt.size();
    CHECK(drain(session) == model.greedy(kPrompt, room));
    CHECK(session.finish_reason() == FinishReason::context);
  }
}

TEST_CASE("compiled: a rewind to any length forgets exactly the rest") {
  const FakeCompiledModel model(Kind::three_stages);
  const Ids first = ids_up_to(13);
  for (size_t length = 0; length <= first.size(); ++length) {
    CAPTURE(length);
    Session session(model.engine, {});
    session.append(first);
    pending_logits(session);
    session.rewind(length);
    Ids second(first.begin(), first.begin() + static_cast<std::ptrdiff_t>(length));
    second = concat(second, {36, 35, 34, 33, 32});
    session.append(std::span(second).subspan(length));
    CHECK(pending_logits(session) == expected_logits(model, second, length));
    session.start(kGreedy, 3);
    CHECK(drain(session) == model.greedy(second, 3));
  }
}

TEST_CASE("compiled: each width runs its own graphs, and the head only for the logits that are wanted") {
  const FakeCompiledModel model(Kind::two_stages);
  Strings runs;
  model.fault.on_run = [&runs](const std::string& file) { runs.push_back(file); };
  Session session(model.engine, {});
  session.append(ids_up_to(9));  // two chunks and a single token
  session.start(kGreedy, 2);
  session.next();
  const Strings chunk = {"embed", "prefill0", "prefill1", "head"};
  const Strings single = {"embed", "decode0", "decode1", "head"};
  Strings expected = chunk;
  expected.insert(expected.end(), chunk.begin(), chunk.end());
  expected.insert(expected.end(), single.begin(), single.end());
  CHECK(runs == expected);
  runs.clear();
  session.next();
  CHECK(runs == single);
  runs.clear();
  session.append(ids_up_to(3));
  pending_logits(session);  // of the generated token and of three more
  CHECK(runs == Strings{"embed", "prefill0", "prefill1", "head", "head", "head", "head"});
}

TEST_CASE("compiled: a smaller chunk than the compiled one is padded as well") {
  const FakeCompiledModel model(Kind::two_stages);
  size_t chunks = 0;
  model.fault.on_run = [&chunks](const std::string& file) { chunks += file == "prefill0"; };
  Session session(model.engine, {.chunk = 2});
  session.append(kPrompt);
  CHECK(pending_logits(session) == expected_logits(model, kPrompt));
  CHECK(chunks == 5);
}

TEST_CASE("compiled: a model of one-token chunks has no use for its prefill graphs") {
  const FakeCompiledModel model(Kind::two_stages, 1);
  model.fault.on_run = [](const std::string& file) { CHECK_FALSE(file.starts_with("prefill")); };
  Session session(model.engine, {});
  session.append(kPrompt);
  CHECK(pending_logits(session) == expected_logits(model, kPrompt));
}

// Without an I/O thread rows are read where they are waited for, so the counter tells when that was.
TEST_CASE("compiled: rows are waited for once, just before the first stage that takes some") {
  for (const Kind kind : {Kind::two_stages, Kind::three_stages}) {
    const FakeCompiledModel model(kind);
    Session session(model.engine, {.prefetch = false});
    std::map<std::string, uint64_t> requests;  // bundles read before a graph ran
    model.fault.on_run = [&](const std::string& file) { requests[file] = session.stats().rows.requests; };
    session.append(Ids{7, 8, 7});
    pending_logits(session);
    CHECK(requests["embed"] == 0);
    CHECK(requests["prefill0"] == 0);
    CHECK(requests["prefill1"] == 2);  // two distinct tokens; the padding repeats one of them
    if (kind == Kind::three_stages) CHECK(requests["prefill2"] == 2);
    CHECK(requests["head"] == 2);
    session.append(Ids{9});
    pending_logits(session);
    CHECK(requests["decode0"] == 2);
    CHECK(requests["decode1"] == 3);
    CHECK(session.stats().rows.requests == 3);
  }
}

TEST_CASE("compiled: an error in any graph comes from next(), and the same step can be taken again") {
  const FakeCompiledModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 5);
  for (const bool prefetch : {true, false}) {
    for (int failing = 1; failing <= 28; ++failing) {  // three chunks and four decode steps, of four runs each
      CAPTURE(failing);
      Session session(model.engine, {.prefetch = prefetch});
      session.append(kPrompt);
      session.start(kGreedy, 5);
      model.fault.countdown = failing;
      CHECK(drain_past_a_fault(session) == expected);
    }
  }
}

TEST_CASE("compiled: a ROM error keeps what was computed before it") {
  const FakeCompiledModel model(Kind::two_stages);
  const Ids prompt = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  for (const bool prefetch : {true, false}) {
    Session session(model.engine, {.prefetch = prefetch});
    session.append(prompt);
    model.damage(8);  // the last of the second chunk
    std::vector<float> logits(prompt.size() * FakeCompiledModel::kVocab);
    check_names(
        error_of<PackageError>([&] { session.logits(session.tokens().size() - session.pending(), logits.data()); }),
        "bundle 8");
    CHECK(session.pending() == 6);
    model.repair(8);
    CHECK(pending_logits(session) == expected_logits(model, prompt, 4));
  }
}

TEST_CASE("compiled: NaN logits and infinite keys are errors that leave nothing in the cache") {
  const FakeCompiledModel model(Kind::two_stages);
  for (const size_t pending : {1U, 3U}) {
    Session session(model.engine, {});
    session.append(kPrompt);
    pending_logits(session);
    const Ids more = ids_up_to(pending);
    session.append(more);
    std::vector<float> logits(pending * FakeCompiledModel::kVocab);
    model.fault.nan = true;
    check_names(
        error_of<PackageError>([&] { session.logits(session.tokens().size() - session.pending(), logits.data()); }),
        "NaN");
    model.fault.nan = false;
    model.fault.infinite = true;
    check_names(
        error_of<PackageError>([&] { session.logits(session.tokens().size() - session.pending(), logits.data()); }),
        "not finite");
    model.fault.infinite = false;
    CHECK(session.pending() == pending);
    // The fake refuses to run over a cache that is not finite, wherever that is.
    CHECK(pending_logits(session) == expected_logits(model, concat(kPrompt, more), kPrompt.size()));
  }
}

TEST_CASE("compiled: the context is the target's, and no option exceeds it") {
  const FakeCompiledModel model(Kind::two_stages);
  CHECK(model.engine->backend().info().context == FakeCompiledModel::kContext);
  CHECK(model.engine->manifest().architecture.context > FakeCompiledModel::kContext);
  check_names(
      error_of<std::invalid_argument>([&] { Session(model.engine, {.context = FakeCompiledModel::kContext + 1}); }),
      "compiled for at most 24");
  Session session(model.engine, {.context = 6});
  session.append(ids_up_to(6));
  CHECK(pending_logits(session) == expected_logits(model, ids_up_to(6)));
  check_names(error_of<std::invalid_argument>([&] { session.append(Ids{1}); }), "24");
}

TEST_CASE("compiled: what an engine says of itself") {
  const FakeCompiledModel model(Kind::two_stages);
  const BackendInfo& info = model.engine->backend().info();
  CHECK(info.provider == Provider::qnn);
  CHECK(info.simulated);
  CHECK(info.soc == "sm0000");
  CHECK(info.kv_type == KvType::float16);
  const FakeModel cpu_model(FakeModel::Kind::two_stages);
  const BackendInfo& cpu = cpu_model.engine->backend().info();
  CHECK(cpu.provider == Provider::cpu);
  CHECK_FALSE(cpu.simulated);
  CHECK(cpu.soc.empty());
  CHECK(parse_provider("qnn") == Provider::qnn);
  CHECK(parse_provider(name_of(Provider::cpu)) == Provider::cpu);
  check_names(error_of<std::invalid_argument>([] { parse_provider("npu"); }), "npu");
}

// An engine of the model's stages as `open` gives it.
std::shared_ptr<const Engine> tried(const FakeCompiledModel& model) {
  return Engine::make(model.engine->rows(), model.load(), 1);
}

TEST_CASE("compiled: the cache is in memory that the NPU shares, each tensor in a piece of its own") {
  const FakeCompiledModel model(Kind::three_stages);
  CHECK_FALSE(model.engine->backend().info().shared_memory);
  model.fault.shared_room = 12;
  {
    const auto engine = tried(model);
    CHECK(engine->backend().info().shared_memory);
    CHECK(model.fault.shared.empty());
    Session first(engine, {});
    std::set<const void*> pieces;
    for (const auto& [name, memory] : model.fault.shared_inputs) {
      CHECK((name.starts_with("past_key.") || name.starts_with("past_value.")));
      pieces.insert(memory);
    }
    CHECK(pieces.size() == 6);  // 3 layers, keys and values: the same ones for all graphs and slots
    CHECK(model.fault.shared.size() == 6);
    {
      Session second(engine, {});
      CHECK(model.fault.shared.size() == 12);
      for (Session* session : {&first, &second}) {
        session->append(kPrompt);
        CHECK(pending_logits(*session) == expected_logits(model, kPrompt));
        CHECK(session->kv_bytes(0) == 3 * 2 * 2 * 4 * 24 * 2);
      }
      // No silent change of what an engine has said of itself.
      check_names(error_of<std::runtime_error>([&] { Session(engine, {}); }), "24 tokens needs 0 MiB that the NPU");
    }
    CHECK(model.fault.shared.size() == 6);
    first.start(kGreedy, 3);
    CHECK(drain(first) == model.greedy(kPrompt, 3));
  }
  CHECK(model.fault.shared.empty());
  CHECK(model.fault.misuses == 0);
}

TEST_CASE("compiled: without enough memory that the NPU shares and takes, the cache is in ordinary memory") {
  const FakeCompiledModel model(Kind::two_stages);
  for (const size_t room : {0, 1, 5, 6}) {
    CAPTURE(room);
    model.fault.shared_room = room;
    model.fault.refuses_shared = room == 6;
    const auto engine = tried(model);
    CHECK_FALSE(engine->backend().info().shared_memory);
    CHECK(model.fault.shared.empty());
    Session session(engine, {});
    CHECK(model.fault.shared.empty());
    session.append(kPrompt);
    CHECK(pending_logits(session) == expected_logits(model, kPrompt));
  }
  model.fault.refuses_shared = false;
  model.fault.nan = true;  // an error that has nothing to do with it
  check_names(error_of<PackageError>([&] { tried(model); }), "NaN");
  CHECK(model.fault.shared.empty());
  CHECK(model.fault.misuses == 0);
}

TEST_CASE("compiled: every step reads the whole cache") {
  const FakeCompiledModel model(Kind::two_stages);
  const Session session(model.engine, {});
  // 3 layers, keys and values, 2 heads of 4, 24 positions, 2 bytes.
  CHECK(session.kv_bytes(0) == 3 * 2 * 2 * 4 * 24 * 2);
  CHECK(session.kv_bytes(20) == session.kv_bytes(0));
}

TEST_CASE("compiled: a synthetic depth is finite, ordinary in size, and there") {
  const FakeCompiledModel model(Kind::two_stages);
  Session session(model.engine, {});
  session.fill_synthetic(10);
  CHECK(session.tokens().size() == 10);
  session.append(Ids{1, 2, 3});
  const std::vector<float> filled = pending_logits(session);  // the fake checks that all of the cache is finite
  session.rewind(0);
  session.append(ids_up_to(10));
  pending_logits(session);
  session.append(Ids{1, 2, 3});
  CHECK(filled != pending_logits(session));  // it was read
  CHECK_THROWS_AS(session.fill_synthetic(100), std::invalid_argument);
}

TEST_CASE("compiled: decode steps do not allocate" * doctest::skip(!kCountsAllocations)) {
  for (const Kind kind : {Kind::dense, Kind::two_stages}) {
    for (const bool prefetch : {true, false}) {
      const FakeCompiledModel model(kind);
      Session session(model.engine, {.prefetch = prefetch});
      session.append(kPrompt);
      session.start(kGreedy, 0);
      session.next();
      const uint64_t before = allocations();
      size_t steps = 0;
      while (session.next()) ++steps;
      CHECK(allocations() - before == 0);
      CHECK(steps == FakeCompiledModel::kContext - kPrompt.size() - 1);
    }
  }
}

TEST_CASE("compiled: names tell what an input or output is") {
  const StageNames& names = kCompiledNames;
  CHECK(names.input("past_length").kind == IoKind::past_length);
  CHECK(names.input("rows").kind == IoKind::rows);
  CHECK(names.input("past_key.12").kind == IoKind::keys);
  CHECK(names.input("past_key.12").layer == 12);
  CHECK(names.input("past_key.12").is_input);
  CHECK(names.input("past_value.3").kind == IoKind::values);
  CHECK(names.output("new_key.0").kind == IoKind::keys);
  CHECK_FALSE(names.output("new_key.0").is_input);
  CHECK(names.output("new_value.7").kind == IoKind::values);
  CHECK(names.output("new_value.7").layer == 7);
  CHECK(names.input("shared_past_key.2").kind == IoKind::seen_keys);
  CHECK(names.input("shared_past_value.2").kind == IoKind::seen_values);
  CHECK(names.input("shared_new_key.2").kind == IoKind::seen_new_keys);
  CHECK(names.input("shared_new_value.2").layer == 2);
  CHECK(names.output("shared_past_key.2").kind == IoKind::hidden);
  for (const std::string name : {"token_ids", "past.0", "past_key.", "past_key.x", "past_key.1x", "past_value.-1",
                                 "past_key.99999999999", "new_key.0", ""}) {
    CHECK(names.input(name).kind == IoKind::hidden);
  }
  for (const std::string name : {"rows", "past_key.0", "new_key.", "logits"}) {
    CHECK(names.output(name).kind == IoKind::hidden);
  }
}

TEST_CASE("compiled: a stage that sees a cache of an earlier one has the same memory") {
  const std::vector<KvCacheInfo> caches = {{.kv_heads = 2, .head_dim = 16}, {.kv_heads = 1, .head_dim = 32}};
  const CompiledKvCache cache({.caches = caches, .context = 40, .chunk = 8}, nullptr);
  const StageNames& names = kCompiledNames;
  const std::string pairs[][2] = {{"new_key.1", "shared_new_key.1"},
                                  {"new_value.1", "shared_new_value.1"},
                                  {"past_key.1", "shared_past_key.1"},
                                  {"past_value.1", "shared_past_value.1"}};
  for (const auto& [made, seen] : pairs) {
    const bool is_new = made.starts_with("new");
    const Tensor its = cache.tensor(made, is_new ? names.output(made) : names.input(made), 8);
    const Tensor same = cache.tensor(seen, names.input(seen), 8);
    CHECK(same.name == seen);
    CHECK(same.data == its.data);
    CHECK(same.shape == its.shape);
    CHECK(its.shape[made.find("key") == std::string::npos ? 1 : 2] == (is_new ? 8 : 40));
  }
}

TEST_CASE("compiled: a stage can see the caches of earlier stages alone") {
  const FakeCompiledModel model(Kind::two_stages);  // layer 0 in the first stage, 1 and 2 in the second
  const auto load = [&model](const char* in, const Strings& seen) {
    model.load([&](const std::string& file, FakeCompiledModel::Names& names) {
      if (file == in) names.first.insert(names.first.end(), seen.begin(), seen.end());
    });
  };
  CHECK_NOTHROW(
      load("decode1", {"shared_past_key.0", "shared_past_value.0", "shared_new_key.0", "shared_new_value.0"}));
  for (const char* name : {"shared_past_key.1", "shared_past_value.0", "shared_new_key.2", "shared_new_value.0"}) {
    CAPTURE(name);
    CHECK_THROWS_WITH_AS(load("decode0", {name}), doctest::Contains("is the cache of no earlier stage"), PackageError);
  }
}

void swap_name(Strings& names, const std::string& name, const Strings& by) {
  REQUIRE(std::erase(names, name) == 1);
  names.insert(names.end(), by.begin(), by.end());
}

TEST_CASE("compiled: stages that do not fit the manifest or each other are errors that name the file") {
  using Names = FakeCompiledModel::Names;
  const FakeCompiledModel model(Kind::two_stages);  // layer 0 in the first stage, 1 and 2 in the second
  CHECK_NOTHROW(model.load());
  struct Case {
    const char* what;
    const char* file;
    void (*spoil)(Names& names);
  };
  const Case cases[] = {
      {"an input of nobody", "decode1", [](Names& n) { n.first.push_back("mystery"); }},
      {"an input made later", "prefill0", [](Names& n) { n.first.push_back("final"); }},
      {"an output made twice", "decode1", [](Names& n) { n.second.push_back("hidden1"); }},
      {"no keys of a layer", "decode1", [](Names& n) { swap_name(n.first, "past_key.2", {}); }},
      {"no values of a layer", "prefill1", [](Names& n) { swap_name(n.first, "past_value.2", {}); }},
      {"no new keys", "prefill1", [](Names& n) { swap_name(n.second, "new_key.1", {}); }},
      {"no new values", "decode0", [](Names& n) { swap_name(n.second, "new_value.0", {}); }},
      {"a layer of two stages", "decode1", [](Names& n) { n.first.push_back("past_key.0"); }},
      {"one layer under two names", "decode1", [](Names& n) { n.second.push_back("new_key.01"); }},
      {"a layer that is not there", "prefill1", [](Names& n) { swap_name(n.first, "past_key.2", {"past_key.3"}); }},
      {"a layer that no stage has", "decode1",
       [](Names& n) {
         for (const char* name : {"past_key.2", "past_value.2"}) swap_name(n.first, name, {});
         for (const char* name : {"new_key.2", "new_value.2"}) swap_name(n.second, name, {});
       }},
      {"rows that the manifest does not give", "decode0", [](Names& n) { n.first.push_back("rows"); }},
      {"rows that the graph does not take", "prefill1", [](Names& n) { swap_name(n.first, "rows", {}); }},
      {"no final states", "decode1", [](Names& n) { swap_name(n.second, "final", {"last"}); }},
      {"embed with another input", "embed", [](Names& n) { n.first.push_back("mask"); }},
      {"embed with another output", "embed", [](Names& n) { n.second = {"hidden"}; }},
      {"a head of something else", "head", [](Names& n) { n.first = {"hidden1"}; }},
      {"a head without logits", "head", [](Names& n) { n.second = {"scores"}; }},
  };
  for (const Case& spoilt : cases) {
    CAPTURE(spoilt.what);
    std::string message = "no error";
    CHECK_NOTHROW(
        try {
          model.load([&spoilt](const std::string& file, Names& names) {
            if (file == spoilt.file) spoilt.spoil(names);
          });
        } catch (const PackageError& error) { message = error.what(); });
    check_names(message, spoilt.file);
  }
}

}  // namespace
}  // namespace meki
