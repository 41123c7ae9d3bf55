// runtime/measure/measure.h over fake stages: who measures what when.

#include "runtime/measure/measure.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <tuple>

#include "runtime/rows/row_decorator.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/measure/measure_support.h"

namespace meki {
namespace {

using namespace test;
using bench::Blocks;
using bench::Measurement;
using bench::Plan;

using Names = std::vector<std::string>;

Plan small_plan() {
  return {.depths = {0, 30}, .prefill = 6, .tokens = 8, .repetitions = 2, .synthetic_depth = true, .compare = true};
}

// The same model with its memory, "meki", and without one, "dense", and what they did, with the bandwidths between.
struct Rival {
  Log log;
  LoggedModel meki{"meki", FakeModel::Kind::one_stage, log};
  LoggedModel dense{"dense", FakeModel::Kind::dense, log};
  Names told;

  Measurement run(const Plan& plan) {
    std::vector<std::shared_ptr<const Engine>> engines = {meki.engine()};
    if (plan.compare) engines.push_back(dense.engine());
    return bench::measure(engines, plan,
                          {.progress = [this](const std::string& text) { told.push_back(text); },
                           .read_bandwidth =
                               [this](size_t) {
                                 log.push_back({"bandwidth"});
                                 return static_cast<double>(log.size());
                               }});
  }

  // Who ran what, without repetition: the prefill of a test, a decode step by its depth, a bandwidth measurement.
  Names ran() const {
    Names names;
    for (const auto& [who, tokens, total] : log) {
      std::string name = who;
      if (tokens > 1) name += total == 6 ? " prefill" : " another prefill";
      if (tokens == 1) name += total >= 30 ? " decode deep" : " decode";
      if (names.empty() || names.back() != name) names.push_back(name);
    }
    return names;
  }
};

Names concat_all(const std::vector<Names>& parts) {
  Names all;
  for (const Names& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

TEST_CASE("measure: rounds interleave the tests and alternate the contenders") {
  Rival rival;
  const Measurement measurement = rival.run(small_plan());
  // The start of a generation is a run of one token, too: first both rewind, then they take turns A B B A. Neighbours
  // of the same name are one entry.
  const auto round = [](const std::string& a, const std::string& b) {
    Names names = {a + " prefill", b + " prefill"};
    for (const std::string what : {" decode", " decode deep"}) {
      const Names rewinds = {"meki" + what, "dense" + what};
      for (const Names& part : {rewinds, Names{a + what, b + what, a + what}}) {
        for (const std::string& name : part) {
          if (names.back() != name) names.push_back(name);
        }
      }
    }
    return names;
  };
  const Names once = {"bandwidth"};
  const Names forward = round("meki", "dense");
  CHECK(rival.ran() == concat_all({forward, once, forward, once, round("dense", "meki"), once}));
  REQUIRE(measurement.bandwidths.size() == 1);
  const auto& [threads, bandwidths] = *measurement.bandwidths.begin();
  CHECK(threads == rival.meki.engine()->threads());
  REQUIRE(bandwidths.size() == 3);
  CHECK(bandwidths.back() == static_cast<double>(rival.log.size()));
  REQUIRE(measurement.rounds.size() == 2);
  for (const auto& blocks : measurement.rounds) CHECK(blocks.size() == 3);
  REQUIRE(measurement.memory.has_value());
  // Of the contender with a memory, which reads its rows from a mapping: no more than a token table leaves mapped.
  CHECK(measurement.memory->rom <= uint64_t{32} << 20);
}

TEST_CASE("measure: what a round measured belongs to its contender") {
  Rival rival;
  const Plan plan = small_plan();
  const Measurement measurement = rival.run(plan);
  REQUIRE(measurement.cases.size() == 3);
  const std::vector<std::tuple<std::string_view, size_t, size_t>> expected = {
      {"prefill", 0, 6}, {"decode", 0, 8}, {"decode", 30, 8}};
  for (size_t index = 0; index < 3; ++index) {
    const bench::Case& it = measurement.cases[index];
    CHECK(std::tuple(it.kind, it.depth, it.tokens) == expected[index]);
    for (const auto& round : measurement.rounds) {
      const Blocks& blocks = round.at(index);
      REQUIRE(blocks.size() == 2);
      for (size_t contender = 0; contender < 2; ++contender) {
        const size_t block_tokens = index == 0 ? 6 : 4;  // a prefill, or turns
        CHECK(blocks[contender].size() == (index == 0 ? 1 : 2));
        for (const bench::Block& block : blocks[contender]) {
          CHECK(block.tokens == block_tokens);
          CHECK(block.ns > 0);
          // A dense model has no rows to wait for.
          CHECK(block.stall_ns.size() == (contender == 1 ? 0 : index == 0 ? 1 : block_tokens));
        }
      }
    }
  }
  // Two turns of 4, each led in by a step, from 30 tokens on.
  std::vector<int64_t> deep;
  for (const Event& event : rival.log) {
    if (event.who == "meki" && event.tokens == 1 && event.total > 30) deep.push_back(event.total);
  }
  const std::vector<int64_t> steps = range(31, 40);
  CHECK(deep == concat(concat(steps, steps), steps));
  const double mean = 35.5;  // of these
  CHECK(std::abs(static_cast<double>(plan.mean_depth(30)) - mean) <= 0.5);
  const Session session(rival.meki.engine(), {});
  CHECK_FALSE(measurement.cases[0].kv_bytes.has_value());
  CHECK(measurement.cases[1].kv_bytes == session.kv_bytes(plan.mean_depth(0)));
  CHECK(measurement.cases[2].kv_bytes == session.kv_bytes(plan.mean_depth(30)));
  CHECK(plan.steps() == 10);
  CHECK(plan.context(30) == bench::decode_context(30, 10));
}

TEST_CASE("measure: one contender decodes in one block") {
  Rival rival;
  Plan plan = small_plan();
  plan.compare = false;
  plan.tokens = 5;
  plan.prefill = 0;
  const Measurement measurement = rival.run(plan);
  REQUIRE(measurement.cases.size() == 2);
  for (const bench::Case& it : measurement.cases) CHECK(it.kind == "decode");
  REQUIRE(measurement.rounds.at(0).at(0).size() == 1);
  REQUIRE(measurement.rounds[0][0][0].size() == 1);
  CHECK(measurement.rounds[0][0][0][0].tokens == 5);
}

TEST_CASE("measure: several contenders run each test one after the other, the last one first in every other round") {
  Rival rival;
  Plan plan = small_plan();
  plan.compare = false;
  std::vector<size_t> bandwidths;
  const std::vector<std::shared_ptr<const Engine>> engines = {rival.meki.engine(), rival.dense.engine()};
  const Measurement measurement = bench::measure(engines, plan, {.read_bandwidth = [&](size_t threads) {
                                                   bandwidths.push_back(threads);
                                                   return 1.0;
                                                 }});
  Names expected;
  for (const bool reverse : {false, false, true}) {  // the warm-up, and two rounds
    const Names order = reverse ? Names{"dense", "meki"} : Names{"meki", "dense"};
    for (const std::string& who : order) expected.push_back(who + " prefill");
    for (const std::string what : {" decode", " decode deep"}) {
      // Both rewind, which is a run of one token, too; neighbours of the same name are one entry.
      for (const std::string& who : concat_all({{"meki", "dense"}, order})) {
        if (expected.back() != who + what) expected.push_back(who + what);
      }
    }
  }
  CHECK(rival.ran() == expected);
  for (const auto& round : measurement.rounds) {
    REQUIRE(round.size() == 3);
    for (const Blocks& blocks : round) {
      REQUIRE(blocks.size() == 2);
      for (const auto& its : blocks) CHECK(its.size() == 1);
    }
    CHECK(round[1][1][0].tokens == plan.tokens);
  }
  CHECK(bandwidths == std::vector<size_t>(3, engines[0]->threads()));  // both have as many
}

TEST_CASE("measure: progress is told as often as announced") {
  std::vector<Plan> plans(3, small_plan());
  plans[1].prefill = 0;
  plans[2].compare = false;
  plans[2].repetitions = 1;
  for (const Plan& plan : plans) {
    Rival rival;
    rival.run(plan);
    CHECK(rival.told.size() == plan.units());
    CHECK(rival.told.front() == "filling 0 tokens");
    CHECK(rival.told.back() == "round " + std::to_string(plan.repetitions) + ": decode 8 at 30");
  }
}

TEST_CASE("measure: turns cancel a linear drift") {
  Plan plan = small_plan();
  plan.tokens = 32;
  for (const bool reverse : {false, true}) {
    const std::vector<size_t> order = bench::turns(plan, 2, reverse);
    REQUIRE(order.size() * plan.turn() == 2 * plan.tokens);
    for (size_t group = 0; group < order.size(); group += 4) {
      size_t places[2] = {};
      for (size_t place = 0; place < 4; ++place) places[order[group + place]] += place;
      CHECK(places[0] == 3);
      CHECK(places[1] == 3);
    }
    CHECK(order.front() == (reverse ? 1 : 0));
  }
}

TEST_CASE("measure: a plan that does not fit its contenders is refused") {
  const FakeModel model(FakeModel::Kind::dense);
  const auto refusal = [&model](const Plan& plan, size_t contenders) {
    const std::vector<std::shared_ptr<const Engine>> engines(contenders, model.engine);
    return error_of<std::invalid_argument>([&] { bench::measure(engines, plan, {}); });
  };
  check_names(refusal({.depths = {0}, .tokens = 8, .compare = true}, 1), "1 contenders, to compare there have to be 2");
  check_names(refusal({.depths = {0}, .tokens = 8}, 0), "no contenders");
  check_names(refusal({.depths = {0}, .tokens = 0}, 1), "tokens is 0");
  check_names(refusal({.depths = {0}, .tokens = 12, .compare = true}, 2), "multiple of 8");
}

class CountedDrops final : public RowDecorator {
 public:
  explicit CountedDrops(std::shared_ptr<const RowSource> source) : RowDecorator(std::move(source)) {}
  void drop_cache() const noexcept override { ++drops; }
  mutable std::atomic<size_t> drops = 0;
};

TEST_CASE("measure: cold rows are dropped before every step, the other contender's too; warm ones never") {
  for (const bool cold : {false, true}) {
    Rival rival;
    const auto& plain = rival.meki.engine();
    const auto rows = std::make_shared<const CountedDrops>(plain->rows());
    const std::shared_ptr<const Backend> backend(plain, &plain->backend());
    const auto engine = std::make_shared<const Engine>(rows, backend, 1);
    Plan plan = small_plan();
    plan.cold = cold;
    const std::vector<std::shared_ptr<const Engine>> engines = {engine, rival.dense.engine()};
    bench::measure(engines, plan, {});
    CHECK(rows->drops == (cold ? rival.log.size() : 0));
    rows->drops = 0;
    rival.log.clear();
    bench::profile_decode(engine, plan, 5, [] {});
    CHECK(rows->drops == (cold ? rival.log.size() : 0));
  }
}

TEST_CASE("measure: a profile is one block from a filled cache") {
  Log log;
  const LoggedModel model("", FakeModel::Kind::one_stage, log);
  const bench::Profile profile = bench::profile_decode(model.engine(), small_plan(), 20, [] {});
  CHECK(profile.block.tokens == 8);
  CHECK(profile.block.stall_ns.size() == 8);
  CHECK(single_steps(log) == range(20, 29));
  CHECK(log.size() == profile.history.size());
  std::vector<bool> expected(10, true);
  expected[0] = expected[1] = false;  // the start and the step that leads in
  CHECK(profile.history == expected);
  CHECK(model.engine().use_count() == 1);
}

TEST_CASE("measure: polling can interrupt every step, progress every test") {
  struct Stop {};
  const FakeModel model(FakeModel::Kind::two_stages);
  const Plan plan{.depths = {0, 20}, .prefill = 3, .tokens = 4, .repetitions = 1};
  const auto interrupt = [&](int limit, bool by_progress) {
    int calls = 0;
    const auto call = [&calls, limit] {
      if (calls++ == limit) throw Stop();
    };
    bench::Hooks hooks;
    if (by_progress) {
      hooks.progress = [&call](const std::string&) { call(); };
    } else {
      hooks.poll = call;
    }
    bench::measure({&model.engine, 1}, plan, hooks);
  };
  const auto units = static_cast<int>(plan.units());
  for (int limit = 0; limit < units; ++limit) CHECK_THROWS_AS(interrupt(limit, true), Stop);
  CHECK_NOTHROW(interrupt(units, true));
  // Two rounds of a prefill and two decode tests of a start, a step that leads in, and four.
  for (int limit = 0; limit < 2 * (1 + 2 * 6); ++limit) CHECK_THROWS_AS(interrupt(limit, false), Stop);
}

}  // namespace
}  // namespace meki
