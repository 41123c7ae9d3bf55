// runtime/measure/sequence.h over fake stages: which steps there are, and which of them a block counts.

#include "runtime/measure/sequence.h"

#include <algorithm>
#include <random>
#include <set>

#include "runtime/measure/process.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/measure/measure_support.h"

namespace meki {
namespace {

using namespace test;
using bench::Block;
using bench::DecodeSequence;
using bench::PrefillSequence;

constexpr auto kRows = FakeModel::Kind::one_stage;
constexpr auto kDense = FakeModel::Kind::dense;

// A block has the session's statistics of its own steps, and nothing of what was before.
void check_figures(const Block& block, const Session& session, size_t tokens) {
  const Stats stats = session.stats();
  CHECK(block.tokens == tokens);
  CHECK(stats.decode_tokens == tokens);
  CHECK(stats.prefill_tokens == 0);
  CHECK(block.ns == stats.decode_ns);
  CHECK(block.ns > 0);
  CHECK(block.sample_ns == stats.sample_ns);
  CHECK(block.stall_ns == stats.stall_ns);
  CHECK(block.rows.requests == stats.rows.requests);
  CHECK(block.rows.requests + 1 >= tokens);  // the first step's rows may have come before the block began
}

TEST_CASE("decode sequence: decode begins at the depth") {
  for (const bool synthetic : {false, true}) {
    for (const size_t depth : {0U, 1U, 2U, 40U}) {
      CAPTURE(synthetic);
      CAPTURE(depth);
      Log log;
      const LoggedModel model("", kRows, log);
      DecodeSequence sequence(model.engine(), depth, 5 + 1, synthetic, {});
      // A filled cache takes no run; a computed one takes one of all tokens but the last of the depth.
      const bool computes = !synthetic && depth > 1;
      CHECK(log.size() == (computes ? 1 : 0));
      if (computes) CHECK(log.front().tokens == static_cast<int64_t>(depth) - 1);
      log.clear();
      sequence.rewind();
      const auto begin = static_cast<int64_t>(std::max<size_t>(depth, 1));
      CHECK(single_steps(log) == range(begin, begin));
      const Block block = sequence.decode(5, 1);
      // One step leads in; those that count follow it.
      CHECK(single_steps(log) == range(begin, begin + 6));
      CHECK(log.size() == 7);
      CHECK(sequence.history() == std::vector<bool>{false, false, true, true, true, true, true});
      check_figures(block, sequence.session(), 5);
      CHECK(block.stall_ns.size() == 5);
    }
  }
}

TEST_CASE("decode sequence: every repetition decodes the same tokens") {
  const FakeModel model(kRows);
  DecodeSequence sequence(model.engine, 10, 8, false, {});
  std::set<Ids> runs;
  for (int run = 0; run < 3; ++run) {
    sequence.rewind();
    sequence.decode(7, 1);
    runs.insert(tokens_of(sequence.session()));
  }
  CHECK(runs.size() == 1);
  CHECK(runs.begin()->size() == 10 + 1 + 8);
}

TEST_CASE("decode sequence: end tokens change what is decoded, but not how much") {
  std::mt19937 random(7);
  const auto below = [&random](size_t limit) { return random() % limit; };
  size_t texts_ended = 0;
  for (int trial = 0; trial < 200; ++trial) {
    std::set<int32_t> ends;
    for (size_t count = below(27); count > 0; --count) ends.insert(static_cast<int32_t>(below(FakeModel::kVocab)));
    const size_t depth = below(13);
    std::vector<size_t> blocks(1 + below(4));
    size_t total = 0;
    for (size_t& tokens : blocks) total += tokens = 1 + below(6);
    CAPTURE(trial);
    Log log;
    const LoggedModel model("", kRows, log, {ends.begin(), ends.end()});
    DecodeSequence sequence(model.engine(), depth, total + blocks.size(), false, {});
    // A real prefill of one token fills depth 2; it is no step of the sequence.
    log.clear();
    sequence.rewind();
    for (const size_t tokens : blocks) {
      const Block block = sequence.decode(tokens, 1);
      CHECK(block.tokens == tokens);
      CHECK(block.stall_ns.size() == tokens);
      CHECK(block.ns == sequence.session().stats().decode_ns);
    }
    const std::vector<int64_t> steps = single_steps(log);
    REQUIRE(sequence.history().size() == steps.size());
    CHECK(log.size() == steps.size());
    size_t counted = 0;
    for (size_t index = 0; index < steps.size(); ++index) {
      if (!sequence.history()[index]) continue;
      ++counted;
      CHECK(steps[index] > static_cast<int64_t>(std::max<size_t>(depth, 1)));  // a decode step, not a start
    }
    CHECK(counted == total);
    texts_ended += steps.size() > 1 + total + blocks.size();
  }
  CHECK(texts_ended > 50);
}

TEST_CASE("decode sequence: a model that only ends is an error") {
  std::vector<int32_t> all;
  for (const int64_t id : range(0, FakeModel::kVocab - 1)) all.push_back(static_cast<int32_t>(id));
  const FakeModel model(kDense, all);
  DecodeSequence sequence(model.engine, 3, 5, false, {});
  check_names(error_of<std::runtime_error>([&] { sequence.rewind(); }), "eos_token_ids");
}

TEST_CASE("decode sequence: steps that the engine does not count are an error") {
  const FakeModel model(kDense);
  DecodeSequence sequence(model.engine, 0, 8, false, {});
  sequence.rewind();
  // The context is full after the eighth step, and what is asked for a ninth one is no step.
  check_names(error_of<std::runtime_error>([&] { sequence.decode(9, 0); }), "counted 8 decode tokens, expected 9");
}

TEST_CASE("decode sequence: blocks follow each other, each led in by a step") {
  Log log;
  const LoggedModel model("", kRows, log);
  DecodeSequence sequence(model.engine(), 30, 10, true, {});
  sequence.rewind();
  sequence.decode(4, 1);
  sequence.decode(4, 1);
  std::vector<int64_t> counted;
  const std::vector<int64_t> steps = single_steps(log);
  REQUIRE(steps.size() == sequence.history().size());
  for (size_t index = 0; index < steps.size(); ++index) {
    if (sequence.history()[index]) counted.push_back(steps[index]);
  }
  CHECK(counted == std::vector<int64_t>{32, 33, 34, 35, 37, 38, 39, 40});
}

TEST_CASE("decode sequence: without a lead-in the step after the rewind counts") {
  Log log;
  const LoggedModel model("", kRows, log);
  DecodeSequence sequence(model.engine(), 20, 3, true, {});
  sequence.rewind();
  check_figures(sequence.decode(3, 0), sequence.session(), 3);
  CHECK(single_steps(log) == range(20, 23));
  CHECK(sequence.history() == std::vector<bool>{false, true, true, true});
}

TEST_CASE("decode sequence: has the context that its steps need and no more") {
  const FakeModel model(kDense);
  CHECK(bench::decode_context(0, 10) == 12);
  CHECK(bench::decode_context(1, 10) == 12);
  CHECK(bench::decode_context(30, 10) == 41);
  for (const size_t depth : {0U, 30U}) {
    const DecodeSequence sequence(model.engine, depth, 10, true, {});
    CHECK(sequence.session().context() == bench::decode_context(depth, 10));
  }
  CHECK(PrefillSequence(model.engine, 6, {}).session().context() == 7);
}

TEST_CASE("prefill sequence: computes the same tokens from nothing") {
  for (const auto kind : {kRows, kDense}) {
    Log log;
    const LoggedModel model("", kind, log);
    PrefillSequence sequence(model.engine(), 20, {});
    std::set<Ids> prompts;
    for (int run = 0; run < 3; ++run) {
      log.clear();
      const Block block = sequence.run();
      REQUIRE(log.size() == 1);
      CHECK(log.front().tokens == 20);
      CHECK(log.front().total == 20);
      Ids prompt = tokens_of(sequence.session());
      prompt.resize(20);
      prompts.insert(prompt);
      const Stats stats = sequence.session().stats();
      CHECK(block.tokens == 20);
      CHECK(block.ns == stats.prefill_ns);
      CHECK(block.ns > 0);
      CHECK(block.sample_ns == 0);
      CHECK(block.rows.requests == (kind == kDense ? 0 : std::set<int64_t>(prompt.begin(), prompt.end()).size()));
      // The mean of a token; a dense model has no rows to wait for.
      CHECK(block.stall_ns ==
            (kind == kDense ? std::vector<uint64_t>{} : std::vector<uint64_t>{stats.prefill_stall_ns / 20}));
    }
    CHECK(prompts.size() == 1);
    CHECK(std::set<int64_t>(prompts.begin()->begin(), prompts.begin()->end()).size() > 5);
  }
}

TEST_CASE("sequences: before_step is called before every step") {
  Log log;
  const LoggedModel model("", kRows, log);
  const bench::StepHooks hooks{.before_step = [&log] { log.push_back({"before"}); }};
  const auto kinds = [&log] {
    std::vector<int64_t> tokens;  // 0: before
    for (const Event& event : log) tokens.push_back(event.tokens);
    return tokens;
  };
  DecodeSequence decode(model.engine(), 4, 4, true, hooks);
  decode.rewind();
  decode.decode(3, 1);
  CHECK(kinds() == std::vector<int64_t>{0, 1, 0, 1, 0, 1, 0, 1, 0, 1});
  log.clear();
  PrefillSequence(model.engine(), 5, hooks).run();
  CHECK(kinds() == std::vector<int64_t>{0, 5});
}

TEST_CASE("sequences: what storage was asked for is told where the system tells") {
  const FakeModel model(kRows);
  const bool tells = bench::storage_bytes().has_value();
  PrefillSequence prefill(model.engine, 5, {});
  CHECK(prefill.run().storage_bytes.has_value() == tells);
  DecodeSequence decode(model.engine, 4, 4, true, {});
  decode.rewind();
  CHECK(decode.decode(3, 1).storage_bytes.has_value() == tells);
}

}  // namespace
}  // namespace meki
