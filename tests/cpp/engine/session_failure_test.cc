// runtime/engine/session: failures and interruptions, counters, threads and allocations.

#include <algorithm>
#include <atomic>
#include <set>
#include <stdexcept>
#include <thread>

#include "runtime/base/error.h"
#include "runtime/engine/session.h"
#include "tests/cpp/allocations.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

struct Interrupt {};

size_t distinct(std::span<const int64_t> ids) { return std::set<int64_t>(ids.begin(), ids.end()).size(); }

TEST_CASE("session: a ROM error in a decode step comes from next(), and the session goes on") {
  const FakeModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 12);
  for (const bool prefetch : {true, false}) {
    for (const bool repaired : {true, false}) {
      Session session(model.engine, {.prefetch = prefetch});
      session.append(kPrompt);
      session.start(kGreedy, 12);
      // The first token that neither the prompt nor an earlier step has shown to be readable.
      size_t good = 0;
      const auto seen = [&](int64_t token) {
        const auto end = expected.begin() + static_cast<std::ptrdiff_t>(good);
        return std::count(kPrompt.begin(), kPrompt.end(), token) + std::count(expected.begin(), end, token) > 0;
      };
      while (seen(expected[good])) ++good;
      const int64_t bad = expected[good];
      model.damage(bad);
      Ids made = drain(session, good + 1);  // `bad` itself comes out; what comes after it needs its rows
      CHECK(made == Ids(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(good) + 1));
      const Ids tokens = tokens_of(session);
      for (int attempt = 0; attempt < 2; ++attempt) {
        check_names(error_of<PackageError>([&] { session.next(); }), "bundle " + std::to_string(bad));
        CHECK(tokens_of(session) == tokens);
        CHECK(session.finish_reason() == FinishReason::running);
      }
      if (!repaired) {  // another way on: not to use that token
        session.rewind(tokens.size() - 1);
        session.start(kGreedy, 1);
        CHECK(drain(session) == Ids{bad});
      }
      model.repair(bad);
      if (repaired) CHECK(concat(made, drain(session)) == expected);
    }
  }
}

TEST_CASE("session: a ROM error in a prompt keeps the chunks before it") {
  const FakeModel model(Kind::two_stages);
  const Ids prompt = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  for (const bool prefetch : {true, false}) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = 3});
    session.append(prompt);
    model.damage(8);  // in the third chunk
    std::vector<float> logits(prompt.size() * FakeModel::kVocab);
    check_names(
        error_of<PackageError>([&] { session.logits(session.tokens().size() - session.pending(), logits.data()); }),
        "bundle 8");
    CHECK(session.pending() == 4);
    check_names(
        error_of<PackageError>([&] { session.logits(session.tokens().size() - session.pending(), logits.data()); }),
        "bundle 8");
    CHECK(session.pending() == 4);
    model.repair(8);
    CHECK(pending_logits(session) == expected_logits(model, prompt, 6));
  }
}

TEST_CASE("session: a session with a request in flight or failed can be destroyed") {
  const FakeModel model(Kind::two_stages);
  model.damage(model.greedy(kPrompt, 1)[0]);
  for (int round = 0; round < 50; ++round) {
    Session session(model.engine, {.chunk = 2});
    session.append(kPrompt);
    session.start(kGreedy, 0);
    drain(session, 1);
    if (round % 2 == 0) CHECK_THROWS_AS(session.next(), PackageError);
  }
}

TEST_CASE("session: a graph error comes from next(), and the same step can be taken again") {
  const FakeModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 6);
  for (const bool prefetch : {true, false}) {
    for (int failing = 1; failing <= 16; ++failing) {  // prompt: four chunks, so eight runs; decode: ten
      CAPTURE(failing);
      Session session(model.engine, {.prefetch = prefetch, .chunk = 3});
      session.append(kPrompt);
      session.start(kGreedy, 6);
      model.fault.countdown = failing;
      CHECK(drain_past_a_fault(session) == expected);
    }
  }
}

TEST_CASE("session: an interruption between chunks loses nothing") {
  const FakeModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 3);
  for (const bool prefetch : {true, false}) {
    for (int stop = 1; stop <= 4; ++stop) {
      CAPTURE(stop);
      Session session(model.engine, {.prefetch = prefetch, .chunk = 3});
      session.append(kPrompt);
      session.start(kGreedy, 3);
      int calls = 0;
      const Session::Poll poll = [&calls, stop] {
        if (++calls == stop) throw Interrupt();
      };
      CHECK_THROWS_AS(session.next(poll), Interrupt);
      CHECK(calls == stop);
      CHECK(tokens_of(session) == kPrompt);
      CHECK(session.pending() == kPrompt.size() - std::min<size_t>(kPrompt.size(), 3 * static_cast<size_t>(stop)));
      CHECK(drain(session) == expected);
    }
  }
}

TEST_CASE("session: logits that are NaN are an error, and the same step can be taken again") {
  const FakeModel model(Kind::two_stages);
  for (const bool prefetch : {true, false}) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = 4});
    session.append(kPrompt);
    std::vector<float> logits(kPrompt.size() * FakeModel::kVocab);
    model.fault.nan = true;
    check_names(
        error_of<PackageError>([&] { session.logits(session.tokens().size() - session.pending(), logits.data()); }),
        "NaN");
    CHECK(session.pending() == kPrompt.size());
    model.fault.nan = false;
    CHECK(pending_logits(session) == expected_logits(model, kPrompt));

    session.start(kGreedy, 0);
    drain(session, 2);
    const Ids tokens = tokens_of(session);
    model.fault.nan = true;
    for (int attempt = 0; attempt < 2; ++attempt) {
      check_names(error_of<PackageError>([&] { session.next(); }), "NaN");
      CHECK(tokens_of(session) == tokens);
    }
    model.fault.nan = false;
    CHECK(drain(session, 3) == model.greedy(tokens, 3));
  }
}

TEST_CASE("session: counters") {
  const FakeModel model(Kind::two_stages);
  for (const bool prefetch : {true, false}) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = 4});
    CHECK(session.stats().rows.requests == 0);
    session.append(kPrompt);
    session.start(kGreedy, 6);
    drain(session);
    // Six tokens take five decode steps: the first comes from the prompt's last one.
    size_t requests = 5;
    for (size_t first = 0; first < kPrompt.size(); first += 4) {
      requests += distinct(std::span(kPrompt).subspan(first, std::min<size_t>(4, kPrompt.size() - first)));
    }
    const Stats stats = session.stats();
    CHECK(stats.prefill_tokens == kPrompt.size());
    CHECK(stats.decode_tokens == 5);
    CHECK(stats.stall_ns.size() == 5);
    CHECK(stats.rows.requests == requests);
    CHECK(stats.rows.bytes == requests * dynamic_cast<const TokenTable&>(*model.engine->rows()).header().bundle_bytes);
    CHECK(stats.prefill_ns > 0);
    CHECK(stats.decode_ns > 0);
    CHECK(stats.prefill_stall_ns <= stats.prefill_ns);

    session.reset_stats();
    const Stats none = session.stats();
    CHECK(none.prefill_tokens + none.prefill_ns + none.prefill_stall_ns + none.decode_tokens + none.decode_ns == 0);
    CHECK(none.stall_ns.empty());
    CHECK(none.rows.requests + none.rows.bytes == 0);
    session.start(kGreedy, 2);  // two more decode steps: of the sixth token, and of the first of these
    drain(session);
    CHECK(session.stats().decode_tokens == 2);
    CHECK(session.stats().prefill_tokens == 0);
    CHECK(session.stats().rows.requests == 2);
    CHECK(stats.decode_tokens == 5);  // a copy does not change
  }
}

TEST_CASE("session: one token of prompt is prefill, also where a generation has just ended") {
  const Ids free_run = FakeModel(Kind::two_stages).greedy(kPrompt, 3);
  const FakeModel model(Kind::two_stages, {static_cast<int32_t>(free_run[2])});
  Session session(model.engine, {});
  session.append(kPrompt);
  session.start(kGreedy, 0);
  drain(session);
  REQUIRE(session.finish_reason() == FinishReason::eos);
  session.reset_stats();
  session.append(Ids{1});
  session.start(kGreedy, 1);
  drain(session);
  CHECK(session.stats().prefill_tokens == 1);
  CHECK(session.stats().decode_tokens == 0);
}

TEST_CASE("session: every decode step has its stall, also after rewinds") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {.context = 16});
  session.append(kPrompt);
  for (int turn = 0; turn < 10; ++turn) {  // more steps in all than the context has tokens
    session.start(kGreedy, 5);
    drain(session);
    session.rewind(kPrompt.size());
  }
  CHECK(session.stats().decode_tokens == 40);
  CHECK(session.stats().stall_ns.size() == 40);
}

TEST_CASE("session: those of one engine run in threads of their own") {
  constexpr size_t kThreads = 4;
  const FakeModel model(Kind::three_stages);
  std::vector<Ids> prompts;
  std::vector<Ids> expected;
  for (size_t i = 0; i < kThreads; ++i) {
    prompts.push_back(concat(kPrompt, {static_cast<int64_t>(i), static_cast<int64_t>(20 + i)}));
    expected.push_back(model.greedy(prompts[i], 20));
  }
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 5; ++round) {
        Session session(model.engine, {.prefetch = i != 0, .chunk = 1 + i});
        session.append(prompts[i]);
        session.start(kGreedy, 20);
        if (drain(session) == expected[i]) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 5 * kThreads);
}

TEST_CASE("session: decode steps do not allocate" * doctest::skip(!kCountsAllocations)) {
  const SamplingOptions sampling{.temperature = 1, .top_k = 20, .min_p = 0.01, .repetition_penalty = 1.1};
  for (const Kind kind : {Kind::dense, Kind::two_stages}) {
    for (const bool prefetch : {true, false}) {
      const FakeModel model(kind);
      Session session(model.engine, {.prefetch = prefetch});
      session.append(kPrompt);
      session.start(sampling, 0);
      session.next();  // the prompt's step binds buffers
      const uint64_t before = allocations();
      size_t steps = 0;
      while (session.next()) ++steps;
      const uint64_t made = allocations() - before;  // of the I/O thread as well
      CHECK(made == 0);
      CHECK(steps == FakeModel::kContext - kPrompt.size() - 1);
    }
  }
}

}  // namespace
}  // namespace meki
