// runtime/engine/session: what it computes, over fake stages (fake_graph.h) and a real ROM file.

#include "engine/session.h"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>

#include "fake_graph.h"
#include "session_support.h"
#include "support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

TEST_CASE("session: logits are the model's, whatever the stages, chunks and prefetching") {
  for (const Kind kind : {Kind::dense, Kind::one_stage, Kind::two_stages, Kind::three_stages}) {
    const FakeModel model(kind);
    const std::vector<float> expected = expected_logits(model, kPrompt);
    for (const bool prefetch : {true, false}) {
      for (const size_t chunk : {1U, 3U, 5U, 10U, 256U}) {
        CAPTURE(chunk);
        Session session(model.engine, {.prefetch = prefetch, .chunk = chunk});
        session.prompt(kPrompt);
        CHECK(session.pending() == kPrompt.size());
        CHECK(pending_logits(session) == expected);
        CHECK(session.pending() == 0);
        CHECK(pending_logits(session).empty());
      }
      Session session(model.engine, {.prefetch = prefetch});
      std::vector<float> one_by_one;
      for (const int64_t token : kPrompt) {
        session.prompt(std::span(&token, 1));
        const std::vector<float> row = pending_logits(session);
        one_by_one.insert(one_by_one.end(), row.begin(), row.end());
      }
      CHECK(one_by_one == expected);
      CHECK(tokens_of(session) == kPrompt);
    }
  }
}

TEST_CASE("session: greedy generation is the model's, with every kind of stages and prefetching") {
  for (const Kind kind : {Kind::dense, Kind::one_stage, Kind::two_stages, Kind::three_stages}) {
    const FakeModel model(kind);
    const Ids expected = model.greedy(kPrompt, 20);
    REQUIRE(std::set<int64_t>(expected.begin(), expected.end()).size() > 5);  // a lively model
    for (const bool prefetch : {true, false}) {
      for (const size_t chunk : {1U, 4U, 256U}) {
        Session session(model.engine, {.prefetch = prefetch, .chunk = chunk});
        session.prompt(kPrompt);
        session.start(kGreedy, 20);
        CHECK(session.finish_reason() == FinishReason::running);
        CHECK(drain(session) == expected);
        CHECK(session.finish_reason() == FinishReason::length);
        CHECK_FALSE(session.next());
        CHECK(tokens_of(session) == concat(kPrompt, expected));
      }
    }
  }
}

TEST_CASE("session: sampled generation depends on the seed alone") {
  const FakeModel model(Kind::two_stages);
  const auto sampled = [&model](uint64_t seed, bool prefetch, size_t chunk) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = chunk});
    session.prompt(kPrompt);
    session.start({.temperature = 5, .top_p = 1, .repetition_penalty = 1.3, .seed = seed}, 20);
    return drain(session);
  };
  CHECK(sampled(1, true, 256) == sampled(1, false, 3));
  CHECK(sampled(1, true, 256) != sampled(2, true, 256));
}

TEST_CASE("session: turns continue one sequence") {
  const FakeModel model(Kind::two_stages);
  for (const bool prefetch : {true, false}) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = 4});
    Ids tokens;
    for (const Ids& prompt : {Ids{7}, Ids{8, 9, 10, 11, 12}, Ids{13, 13}}) {
      session.prompt(prompt);
      tokens = concat(tokens, prompt);
      session.start(kGreedy, 3);
      const Ids expected = model.greedy(tokens, 3);
      CHECK(drain(session) == expected);
      tokens = concat(tokens, expected);
    }
    // And without a new prompt, as if it had not stopped.
    session.start(kGreedy, 4);
    CHECK(drain(session) == model.greedy(tokens, 4));
  }
}

TEST_CASE("session: logits in the middle of a generation") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {.chunk = 4});
  session.prompt(kPrompt);
  session.start(kGreedy, 0);
  drain(session, 3);
  const Ids tokens = tokens_of(session);
  CHECK(session.pending() == 1);
  CHECK(pending_logits(session) == expected_logits(model, tokens, tokens.size() - 1));
  CHECK(drain(session, 2) == model.greedy(tokens, 2));
}

TEST_CASE("session: a prompt ends a running generation; a new one has the room that is left") {
  const FakeModel model(Kind::two_stages);
  for (const size_t filler : {1U, 3U, 4U}) {  // of four tokens of room
    Session session(model.engine, {.context = 16});
    session.prompt(kPrompt);
    session.start(kGreedy, 0);
    drain(session, 2);
    session.prompt(Ids(filler, 8));
    const Ids tokens = tokens_of(session);
    CHECK_THROWS_AS(session.next(), std::invalid_argument);
    CHECK(tokens_of(session) == tokens);
    session.start(kGreedy, 0);
    CHECK(drain(session) == model.greedy(tokens, 4 - filler));
    CHECK(session.finish_reason() == FinishReason::context);
    CHECK(session.tokens().size() == session.context());
  }
}

TEST_CASE("session: after a rewind the rest is as if it had never been") {
  const FakeModel model(Kind::two_stages);
  const Ids all = concat(kPrompt, model.greedy(kPrompt, 6));
  for (size_t length = 0; length <= all.size(); ++length) {
    CAPTURE(length);
    Session session(model.engine, {.chunk = 4});
    session.prompt(kPrompt);
    session.start(kGreedy, 6);
    drain(session);
    session.rewind(length);
    const Ids kept(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(length));
    CHECK(tokens_of(session) == kept);
    if (length < all.size()) CHECK_THROWS_AS(session.next(), std::invalid_argument);  // the generation is gone
    if (length == 0) {
      CHECK_THROWS_AS(session.start(kGreedy, 1), std::invalid_argument);
    } else {
      session.start(kGreedy, 3);
      CHECK(drain(session) == model.greedy(kept, 3));
      session.rewind(length);
    }
    session.prompt(Ids{20, 21});
    const Ids branch = concat(kept, {20, 21});
    const size_t pending = session.pending();
    CHECK(pending >= 2);
    CHECK(pending_logits(session) == expected_logits(model, branch, branch.size() - pending));
  }
}

TEST_CASE("session: a rewind beyond the sequence is refused, and changes nothing") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {});
  session.prompt(kPrompt);
  const std::string message = error_of<std::invalid_argument>([&] { session.rewind(11); });
  check_names(message, "11");
  check_names(message, "10");
  CHECK(tokens_of(session) == kPrompt);
  CHECK(pending_logits(session) == expected_logits(model, kPrompt));
}

TEST_CASE("session: a generation ends at the context, the length or the end token") {
  const Ids free_run = FakeModel(Kind::two_stages).greedy(kPrompt, 12);
  const int64_t eos = free_run[7];
  const auto eos_at = static_cast<size_t>(std::find(free_run.begin(), free_run.end(), eos) - free_run.begin());
  REQUIRE(eos_at > 2);
  const FakeModel model(Kind::two_stages, {static_cast<int32_t>(eos)});
  Session session(model.engine, {.context = kPrompt.size() + eos_at + 1});
  session.prompt(kPrompt);

  session.start(kGreedy, 2);
  CHECK(drain(session) == Ids{free_run[0], free_run[1]});
  CHECK(session.finish_reason() == FinishReason::length);

  session.start(kGreedy, 0);
  CHECK(drain(session).size() == eos_at - 2);
  CHECK(session.finish_reason() == FinishReason::eos);
  CHECK_FALSE(session.next());
  Ids tokens = concat(kPrompt, Ids(free_run.begin(), free_run.begin() + static_cast<std::ptrdiff_t>(eos_at)));
  CHECK(tokens_of(session) == tokens);  // without the end token

  // One token of room is left; what ends the text again is a prompt's business.
  session.rewind(tokens.size() - 1);
  session.prompt(Ids{1});
  tokens.back() = 1;
  session.start(kGreedy, 100);
  const Ids last = model.greedy(tokens, 1);
  REQUIRE(last[0] != eos);
  CHECK(drain(session) == last);
  CHECK(session.finish_reason() == FinishReason::context);
  CHECK(session.tokens().size() == session.context());
  session.start(kGreedy, 1);
  CHECK_FALSE(session.next());
  CHECK(session.finish_reason() == FinishReason::context);
}

TEST_CASE("session: a prompt that does not fit or is not of the vocabulary leaves everything as it was") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {.context = 12});
  session.prompt(kPrompt);
  session.start(kGreedy, 0);
  drain(session, 1);
  const Ids tokens = tokens_of(session);
  const std::string message = error_of<std::invalid_argument>([&] { session.prompt(Ids{1, 2}); });
  check_names(message, "13");
  check_names(message, "12");
  for (const int64_t wrong : {int64_t{-1}, int64_t{37}, int64_t{1} << 32, std::numeric_limits<int64_t>::min()}) {
    check_names(error_of<std::invalid_argument>([&] { session.prompt(Ids{1, wrong}); }), std::to_string(wrong));
  }
  session.prompt({});  // no token, no change
  CHECK(tokens_of(session) == tokens);
  CHECK(drain(session) == model.greedy(tokens, 1));
  CHECK(session.finish_reason() == FinishReason::context);
}

TEST_CASE("session: options and calls outside their limits are refused") {
  const FakeModel model(Kind::two_stages);
  const std::string message =
      error_of<std::invalid_argument>([&] { Session(model.engine, {.context = FakeModel::kContext + 1}); });
  check_names(message, "49");
  check_names(message, "48");
  check_names(error_of<std::invalid_argument>([&] { Session(model.engine, {.chunk = 0}); }), "chunk");
  Session session(model.engine, {});
  CHECK(session.context() == FakeModel::kContext);  // the model's own is below the default
  CHECK_THROWS_AS(session.start(kGreedy, 1), std::invalid_argument);
  CHECK_THROWS_AS(session.next(), std::invalid_argument);
  session.prompt(kPrompt);
  CHECK_THROWS_AS(session.start({.temperature = -1}, 1), std::invalid_argument);
  session.start(kGreedy, 2);
  CHECK(drain(session) == model.greedy(kPrompt, 2));
}

TEST_CASE("session: the KV cache has the default size, the given one, or an error names what it needs") {
  Manifest manifest;
  manifest.architecture = FakeModel(Kind::dense).engine->manifest().architecture;
  manifest.architecture.layers = 2;
  manifest.architecture.context = 0x7FFFFFFF;
  manifest.stages = {{"stage", std::nullopt}};
  const GraphLoader load = [](const std::filesystem::path&) {
    const std::vector<std::string> inputs = {"token_ids", "total_sequence_length", "past.0", "past.1", "logit_index"};
    return std::make_unique<FakeGraph>(inputs, std::vector<std::string>{"present.0", "present.1", "logits"});
  };
  const auto engine = [&] { return std::make_shared<const Engine>(manifest, nullptr, load, 1, KvType::float32); };
  CHECK(Session(engine(), {}).context() == SessionOptions::kDefaultContext);
  CHECK(Session(engine(), {.context = 5000}).context() == 5000);
  // 2^56 bytes, more than any address space; and 2^64, which wraps around 64 bits.
  for (const uint32_t heads : {1U << 12, 1U << 20}) {
    manifest.architecture.kv_heads = heads;
    manifest.architecture.head_dim = 512;
    check_names(error_of<std::runtime_error>([&] { Session(engine(), {.context = 0x7FFFFFFF}); }), "2147483647");
  }
}

}  // namespace
}  // namespace meki
