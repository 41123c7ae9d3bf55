// runtime/base/thread_pool. These tests also run under ThreadSanitizer: what pieces write is plain memory, so that a
// piece that runs twice or is not waited for is a data race.

#include "runtime/base/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "tests/cpp/allocations.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace std::chrono_literals;
using test::allocations;
using test::kCountsAllocations;

#if defined(__SANITIZE_THREAD__)
constexpr bool kCanFork = false;  // ThreadSanitizer does not support threads and fork together
#else
constexpr bool kCanFork = true;
#endif

// Waits until `condition` holds. False: it did not in a time that only a deadlock takes, on the busiest machine.
template <class Condition>
bool eventually(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + 60s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

// Longer than idle workers look for work: they sleep.
void let_workers_sleep() { std::this_thread::sleep_for(5ms); }

// Parallel's own call takes a short way for few pieces or threads; this one always goes to the pool.
template <class Piece>
void run(ThreadPool& pool, size_t pieces, Piece piece) {
  const Parallel parallel = pool.parallel();
  parallel.run(parallel.context, pieces, [](void* data, size_t index) { (*static_cast<Piece*>(data))(index); }, &piece);
}

// Whether a run of `pieces` pieces does each of them once and shows the caller what they wrote.
bool runs_each_once(ThreadPool& pool, size_t pieces) {
  std::vector<size_t> times(pieces);
  run(pool, pieces, [&times](size_t index) { ++times[index]; });
  return times == std::vector<size_t>(pieces, 1);
}

TEST_CASE("thread pool: every piece runs once, for any number of pieces and threads") {
  for (size_t threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    CHECK(pool.parallel().threads == threads);
    for (const size_t pieces : {0U, 1U, 2U, 3U, 4U, 5U, 7U, 16U, 63U, 64U, 65U, 1000U, 20'000U}) {
      CAPTURE(threads);
      CAPTURE(pieces);
      for (int round = 0; round < 10; ++round) CHECK(runs_each_once(pool, pieces));
      std::vector<size_t> made(pieces);
      pool.parallel()(pieces, [&made](size_t index) { made[index] = index; });
      std::vector<size_t> expected(pieces);
      std::iota(expected.begin(), expected.end(), size_t{0});
      CHECK(made == expected);
    }
  }
}

TEST_CASE("thread pool: thousands of runs in a row, each with pieces and memory of its own") {
  for (size_t threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    size_t wrong = 0;
    for (size_t round = 0; round < 10'000; ++round) {
      const size_t pieces = round * 7 % 20;  // a worker that is late must not take one of another run
      std::vector<size_t> made(pieces, 0);
      run(pool, pieces, [&made, round](size_t index) { made[index] += round + index; });
      const size_t sum = std::accumulate(made.begin(), made.end(), size_t{0});
      if (sum != pieces * round + pieces * (pieces - (pieces > 0 ? 1 : 0)) / 2) ++wrong;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("thread pool: after a pause all workers wake up and take part") {
  for (size_t threads = 2; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    for (int round = 0; round < 10; ++round) {
      if (round % 3 != 2) let_workers_sleep();
      // As many pieces as threads, and none ends before all have begun: each thread has one.
      std::atomic<size_t> inside = 0;
      std::atomic<size_t> alone = 0;
      std::vector<std::thread::id> ids(threads);
      run(pool, threads, [&](size_t index) {
        ids[index] = std::this_thread::get_id();
        ++inside;
        if (!eventually([&] { return inside == threads; })) ++alone;
      });
      CHECK(alone == 0);
      CHECK(std::set(ids.begin(), ids.end()).size() == threads);
      CHECK(std::count(ids.begin(), ids.end(), std::this_thread::get_id()) == 1);
    }
  }
}

TEST_CASE("thread pool: a slow thread holds up nobody; the others do the rest of the pieces meanwhile") {
  constexpr size_t kPieces = 50;
  for (size_t threads = 2; threads <= 4; ++threads) {
    for (const bool slow_caller : {false, true}) {
      CAPTURE(threads);
      CAPTURE(slow_caller);
      ThreadPool pool(threads);
      const auto caller = std::this_thread::get_id();
      std::atomic<bool> slow_begun = false;
      std::atomic<size_t> done = 0;
      std::atomic<size_t> waited_in_vain = 0;
      run(pool, kPieces, [&](size_t) {
        if ((std::this_thread::get_id() == caller) == slow_caller && !slow_begun.exchange(true)) {
          // This piece ends only when all others have: whoever waited for it would wait for ever.
          if (!eventually([&] { return done == kPieces - 1; })) ++waited_in_vain;
        } else if (!eventually([&] { return slow_begun.load(); })) {  // lest the rest be done before it begins
          ++waited_in_vain;
        }
        ++done;
      });
      CHECK(waited_in_vain == 0);
      CHECK(done == kPieces);  // the run has waited for the slow piece
    }
  }
}

TEST_CASE("thread pool: a second caller does its work alone, and so does a piece that has pieces") {
  ThreadPool pool(3);
  std::atomic<bool> inside = false;
  std::atomic<bool> release = false;
  std::atomic<size_t> waited_in_vain = 0;
  std::vector<size_t> first(10);
  std::thread other([&] {
    run(pool, first.size(), [&](size_t index) {
      inside = true;
      if (!eventually([&] { return release.load(); })) ++waited_in_vain;
      ++first[index];
    });
  });
  CHECK(eventually([&] { return inside.load(); }));
  std::vector<std::thread::id> ids(50);
  run(pool, ids.size(), [&ids](size_t index) { ids[index] = std::this_thread::get_id(); });
  CHECK(ids == std::vector(50, std::this_thread::get_id()));
  release = true;
  other.join();
  CHECK(waited_in_vain == 0);
  CHECK(first == std::vector<size_t>(10, 1));

  std::vector<std::vector<size_t>> nested(20, std::vector<size_t>(20));
  run(pool, nested.size(),
      [&](size_t outer) { run(pool, nested[outer].size(), [&, outer](size_t index) { ++nested[outer][index]; }); });
  CHECK(nested == std::vector(20, std::vector<size_t>(20, 1)));
}

TEST_CASE("thread pool: callers in threads of their own, all at once") {
  constexpr size_t kCallers = 3;
  constexpr size_t kRounds = 1000;
  ThreadPool pool(3);
  std::atomic<size_t> right = 0;
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&pool, &right, caller] {
      for (size_t round = 0; round < kRounds; ++round) {
        if (runs_each_once(pool, (caller + round) % 40)) ++right;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(right == kCallers * kRounds);
}

TEST_CASE("thread pool: made and destroyed at any moment of its workers' lives") {
  for (int round = 0; round < 200; ++round) {
    ThreadPool pool(1 + static_cast<size_t>(round) % 4);
    if (round % 5 > 0) CHECK(runs_each_once(pool, static_cast<size_t>(round)));
    if (round % 3 == 0) std::this_thread::yield();
    if (round % 20 == 0) let_workers_sleep();
  }
}

TEST_CASE("thread pool: in a forked child, where the workers are not, the child does the work alone" *
          doctest::skip(!kCanFork)) {
  for (const bool asleep : {false, true}) {
    auto pool = std::make_unique<ThreadPool>(3);
    REQUIRE(runs_each_once(*pool, 100));
    if (asleep) let_workers_sleep();
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      ::alarm(20);  // a destructor that waits for the workers waits for ever
      // (Not where a worker may have been caught looking for work: it counts as busy for ever.)
      const bool right = !asleep || (runs_each_once(*pool, 100) && runs_each_once(*pool, 1));
      pool.reset();
      ::_exit(right ? 0 : 1);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    CHECK(runs_each_once(*pool, 100));  // the parent has not noticed
  }
}

TEST_CASE("thread pool: a run does not allocate, whether workers look for work or sleep" *
          doctest::skip(!kCountsAllocations)) {
  ThreadPool pool(3);
  std::vector<size_t> times(30);
  const uint64_t before = allocations();
  for (int round = 0; round < 1000; ++round) {
    if (round % 100 == 0) let_workers_sleep();
    run(pool, times.size(), [&times](size_t index) { ++times[index]; });
  }
  const uint64_t made = allocations() - before;  // of the workers as well
  CHECK(made == 0);
  CHECK(times == std::vector<size_t>(30, 1000));
}

}  // namespace
}  // namespace meki
