// Session::step_together: steps that several sessions take at once.

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

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

Ids prompt_of(size_t number) {
  return concat(Ids(kPrompt.begin(), kPrompt.begin() + 1 + static_cast<std::ptrdiff_t>(number % 9)),
                {static_cast<int64_t>(10 + number)});
}

// A session that has begun to generate, whose prompt is computed but for its last token.
std::unique_ptr<Session> begin(const FakeModel& model, size_t number, const SessionOptions& options = {}) {
  auto session = std::make_unique<Session>(model.engine, options);
  const Ids prompt = prompt_of(number);
  session->append(prompt);
  session->start(kGreedy, 8);
  session->compute(prompt.size() - 1);
  CHECK(session->pending() == 1);
  return session;
}

struct Group {
  std::vector<std::unique_ptr<Session>> owned;
  std::vector<Session*> sessions;

  Group(const FakeModel& model, size_t count) {
    for (size_t i = 0; i < count; ++i) add(begin(model, i, {.context = 20 + i, .prefetch = i % 3 != 0}));
  }
  void add(std::unique_ptr<Session> session) {
    sessions.push_back(session.get());
    owned.push_back(std::move(session));
  }
};

TEST_CASE("batch: sessions that come and go say what each says alone") {
  for (const Kind kind : {Kind::dense, Kind::one_stage, Kind::two_stages, Kind::three_stages}) {
    const FakeModel model(kind);
    size_t most = 0;
    model.fault.on_run = [&most](int64_t tokens, int64_t) { most = std::max(most, static_cast<size_t>(tokens)); };
    Group group(model, 20);
    std::vector<Ids> made(group.sessions.size());
    most = 0;
    for (size_t round = 0; round < 40; ++round) {
      std::vector<Session*> chosen;
      for (size_t i = 0; i < group.sessions.size(); ++i) {
        if (round % 3 == 0 || (round + i) % 4 != 0) chosen.push_back(group.sessions[i]);
      }
      Session::step_together(chosen);
      for (Session* const session : chosen) {
        if (session->finish_reason() == FinishReason::running) CHECK(session->pending() == 0);
      }
      for (size_t i = 0; i < group.sessions.size(); ++i) {
        if (std::find(chosen.begin(), chosen.end(), group.sessions[i]) == chosen.end()) continue;
        if (const auto token = group.sessions[i]->next()) made[i].push_back(*token);
      }
    }
    for (size_t i = 0; i < made.size(); ++i) CHECK(made[i] == model.greedy(prompt_of(i), 8));
    CHECK(most == BatchExecutor::kMost);
  }
}

TEST_CASE("batch: prompts, drafts, other engines and what is over go their own way") {
  const FakeModel model(Kind::two_stages);
  const FakeModel other(Kind::dense);
  Group group(model, 2);
  group.add(begin(other, 2));
  group.add(begin(model, 3, {.drafter = prompt_lookup()}));
  group.add(std::make_unique<Session>(model.engine, SessionOptions{}));
  group.sessions.back()->append(kPrompt);  // all of it is pending
  group.sessions.back()->start(kGreedy, 8);
  group.add(begin(model, 5));
  CHECK(drain(*group.sessions.back()) == model.greedy(prompt_of(5), 8));
  Session::step_together(group.sessions);
  std::vector<Ids> made;
  for (size_t i = 0; i < 5; ++i) {
    CHECK(group.sessions[i]->pending() == 0);
    made.push_back(drain(*group.sessions[i]));
  }
  CHECK(made[0] == model.greedy(prompt_of(0), 8));
  CHECK(made[1] == model.greedy(prompt_of(1), 8));
  CHECK(made[2] == other.greedy(prompt_of(2), 8));
  CHECK(made[3] == model.greedy(prompt_of(3), 8));
  CHECK(made[4] == model.greedy(kPrompt, 8));
  CHECK(!group.sessions[5]->next());

  Session::step_together({});
  Session without(model.engine, {});
  Session* const list[] = {&without};
  CHECK_THROWS_AS(Session::step_together(list), std::invalid_argument);  // no generation was started
}

TEST_CASE("batch: rows that cannot be read are an error of one session") {
  for (const bool prefetch : {true, false}) {
    const FakeModel model(Kind::three_stages);
    Group group(model, 0);
    const Ids lasts = {30, 31, 32, 33};
    for (const int64_t last : lasts) {
      auto session = std::make_unique<Session>(model.engine, SessionOptions{.prefetch = prefetch});
      session->append(concat(kPrompt, {last}));
      session->start(kGreedy, 4);
      session->compute(kPrompt.size());
      group.add(std::move(session));
    }
    model.damage(32);
    Session::step_together(group.sessions);
    for (size_t i = 0; i < lasts.size(); ++i) CHECK(group.sessions[i]->pending() == (i == 2 ? 1 : 0));
    for (int attempt = 0; attempt < 2; ++attempt) {
      check_names(error_of<PackageError>([&] { group.sessions[2]->next(); }), "bundle 32");
    }
    model.repair(32);
    Session::step_together(group.sessions);
    for (size_t i = 0; i < lasts.size(); ++i) {
      CHECK(drain(*group.sessions[i]) == model.greedy(concat(kPrompt, {lasts[i]}), 4));
    }
  }
}

TEST_CASE("batch: where a stage fails, or computes NaN, each session can try alone") {
  const FakeModel model(Kind::two_stages);
  for (const int failing : {1, 2}) {
    Group group(model, 4);
    model.fault.countdown = failing;
    CHECK_THROWS_AS(Session::step_together(group.sessions), std::runtime_error);  // the fake's is no PackageError
    for (size_t i = 0; i < 4; ++i) {
      CHECK(group.sessions[i]->pending() == 1);
      CHECK(drain(*group.sessions[i]) == model.greedy(prompt_of(i), 8));
    }
  }
  Group group(model, 3);
  model.fault.nan = true;
  Session::step_together(group.sessions);
  for (Session* const session : group.sessions) {
    check_names(error_of<PackageError>([&] { session->next(); }), "NaN");
  }
  model.fault.nan = false;
  for (size_t i = 0; i < 3; ++i) CHECK(drain(*group.sessions[i]) == model.greedy(prompt_of(i), 8));
}

TEST_CASE("batch: what a shared step counts") {
  const FakeModel model(Kind::two_stages);
  Group group(model, 3);
  for (int step = 0; step < 4; ++step) {
    Session::step_together(group.sessions);
    for (Session* const session : group.sessions) session->next();
  }
  for (size_t i = 0; i < 3; ++i) {
    const Stats stats = group.sessions[i]->stats();
    CHECK(stats.prefill_tokens == prompt_of(i).size());
    CHECK(stats.prefill_ns > 0);
    CHECK(stats.decode_tokens == 3);  // the first came from the prompt's last token
    CHECK(stats.stall_ns.size() == 3);
    CHECK(stats.decode_ns > stats.sample_ns);
  }
}

TEST_CASE("batch: steps do not allocate once their number of sessions was seen" * doctest::skip(!kCountsAllocations)) {
  for (const Kind kind : {Kind::dense, Kind::three_stages}) {
    const FakeModel model(kind);
    Group group(model, 6);
    const auto step = [&group](size_t count) {
      Session::step_together(std::span(group.sessions).first(count));
      for (size_t i = 0; i < count; ++i) group.sessions[i]->next();
    };
    for (const size_t count : {6, 5, 2}) step(count);
    const uint64_t before = allocations();
    for (const size_t count : {6, 2, 5}) step(count);
    CHECK(allocations() - before == 0);
  }
}

TEST_CASE("batch: threads that share an engine take turns") {
  constexpr size_t kThreads = 3;
  const FakeModel model(Kind::two_stages);
  std::vector<std::vector<Ids>> expected(kThreads);
  for (size_t i = 0; i < kThreads; ++i) {
    for (size_t j = 0; j < 4; ++j) expected[i].push_back(model.greedy(prompt_of(i + j), 8));
  }
  std::atomic<size_t> right = 0;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      std::vector<std::unique_ptr<Session>> owned;
      std::vector<Session*> sessions;
      for (size_t j = 0; j < 4; ++j) {
        owned.push_back(std::make_unique<Session>(model.engine, SessionOptions{}));
        sessions.push_back(owned.back().get());
        sessions.back()->append(prompt_of(i + j));
        sessions.back()->start(kGreedy, 8);
      }
      std::vector<Ids> made(4);
      for (int round = 0; round < 9; ++round) {
        Session::step_together(sessions);
        for (size_t j = 0; j < 4; ++j) {
          if (const auto token = sessions[j]->next()) made[j].push_back(*token);
        }
      }
      if (made == expected[i]) ++right;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == kThreads);
}

TEST_CASE("batch: not in a forked child") {
  const FakeModel model(Kind::two_stages);
  Group group(model, 2);
  Session::step_together(group.sessions);
  for (Session* const session : group.sessions) session->next();
  const pid_t child = ::fork();
  if (child == 0) {
    bool refused = false;
    try {
      Session::step_together(group.sessions);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
}

}  // namespace
}  // namespace meki
