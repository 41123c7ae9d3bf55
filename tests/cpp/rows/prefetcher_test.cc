// runtime/rows/prefetcher over a ROM file. These tests also run under ThreadSanitizer.

#include "runtime/rows/prefetcher.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>

#include "runtime/base/error.h"
#include "runtime/rows/delayed_rows.h"
#include "runtime/rows/token_table.h"
#include "tests/cpp/allocations.h"
#include "tests/cpp/rows/faulty_rows.h"
#include "tests/cpp/rows/requests.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::buffer_of;
using test::check_names;
using test::error_of;
using test::FaultyRows;
using test::kFloat16;
using test::kFloat32;
using test::kInt4;
using test::kInt8;
using test::RomImage;
using test::TempDir;

constexpr size_t kMaxTokens = 24;
constexpr size_t kBuffers = 2;

// A ROM file, what is in it, and a source of its rows that tests can damage.
struct Fixture {
  explicit Fixture(uint32_t row_type = kInt8, RomAccess access = RomAccess::mmap)
      : image({.vocab_size = 50, .layers = 3, .row_dim = 21, .row_type = row_type}, row_type) {
    test::write_file(path, image.bytes);
    rom = std::make_shared<const TokenTable>(path, access);
    source = std::make_shared<const FaultyRows>(rom);
  }
  // Whether `request` holds the rows of `ids`.
  bool holds(const RowRequest& request, std::span<const int32_t> ids) const {
    const std::vector<float> expected = image.rows(ids);
    return std::equal(expected.begin(), expected.end(), request.rows());
  }
  // Bytes that one read asks for.
  size_t request_bytes(int32_t token) const {
    const test::AlignedBuffer scratch(rom->scratch_bytes());
    std::vector<float> rows(size_t{image.shape.layers} * image.shape.row_dim);
    return rom->read(static_cast<uint64_t>(token), scratch.span(), rows.data(), image.shape.row_dim);
  }

  TempDir dir;
  std::filesystem::path path = dir / "memory.rom";
  RomImage image;
  std::shared_ptr<const TokenTable> rom;
  std::shared_ptr<const FaultyRows> source;
};

// 1 to kMaxTokens ids; half of the requests draw from so few that most repeat.
std::vector<int32_t> random_ids(std::mt19937& random) {
  std::vector<int32_t> ids(1 + random() % kMaxTokens);
  const uint32_t choices = random() % 2 == 0 ? 50 : 3;
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % choices);
  return ids;
}

// Lets the I/O thread finish in some rounds, begin in others, and not be scheduled at all in the rest.
void pause(std::mt19937& random) {
  switch (random() % 4) {
    case 0: std::this_thread::sleep_for(std::chrono::microseconds(200)); break;
    case 1: std::this_thread::yield(); break;
    default: break;
  }
}

TEST_CASE("prefetcher: the rows of random ids equal the naive reading, each distinct id read once") {
  for (const uint32_t row_type : {kFloat16, kInt8, kInt4, kFloat32}) {
    for (const RomAccess access : {RomAccess::mmap, RomAccess::pread, RomAccess::direct}) {
      for (const bool asynchronous : {false, true}) {
        const Fixture fixture(row_type, access);
        Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
        std::mt19937 random(row_type);
        uint64_t requests = 0;
        uint64_t bytes = 0;
        for (int round = 0; round < 40; ++round) {
          CAPTURE(round);
          const std::vector<int32_t> ids = random_ids(random);
          RowRequest request = test::request(prefetcher, ids);
          pause(random);
          request.wait();
          CHECK(fixture.holds(request, ids));
          for (const int32_t id : std::set<int32_t>(ids.begin(), ids.end())) {
            ++requests;
            bytes += fixture.request_bytes(id);
          }
          CHECK(prefetcher.counters().requests == requests);
          CHECK(prefetcher.counters().bytes == bytes);
        }
      }
    }
  }
}

TEST_CASE("prefetcher: one buffer is filled while the other is in use, in memory that stays") {
  const Fixture fixture;
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
    const float* const memory[] = {prefetcher.rows(0), prefetcher.rows(1)};
    std::mt19937 random(5);
    std::vector<int32_t> ids = random_ids(random);
    RowRequest current = test::request(prefetcher, ids);
    for (int round = 0; round < 200; ++round) {
      const size_t buffer = static_cast<size_t>(round % 2);
      std::vector<int32_t> next_ids = random_ids(random);
      const std::vector<int32_t> kept = next_ids;
      RowRequest next = test::request(prefetcher, next_ids);
      next_ids.assign(next_ids.size(), 0);  // request() needs them no more
      pause(random);
      current.wait();
      CHECK(fixture.holds(current, ids));
      CHECK(buffer_of(prefetcher, current) == buffer);
      CHECK(current.rows() == memory[buffer]);
      ids = kept;
      current = std::move(next);
    }
  }
}

TEST_CASE("prefetcher: two requests are answered in either order of waiting") {
  const Fixture fixture;
  const std::vector<int32_t> ids[] = {{1, 2, 3}, {4, 3, 2, 49}};
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
    for (int round = 0; round < 100; ++round) {
      const int first = round / 2 % 2;
      RowRequest requests[2];
      for (const int i : {round % 2, 1 - round % 2}) requests[i] = test::request(prefetcher, ids[i]);
      requests[first].wait();
      requests[1 - first].wait();
      CHECK(fixture.holds(requests[0], ids[0]));
      CHECK(fixture.holds(requests[1], ids[1]));
    }
  }
}

TEST_CASE("prefetcher: a request that is dropped is not seen again, be it queued, running, done or failed") {
  const Fixture fixture;
  fixture.source->damage(7);
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
    std::mt19937 random(6);
    for (int round = 0; round < 200; ++round) {
      CAPTURE(round);
      RowRequest held;  // in some rounds there is but one buffer for all the others
      if (random() % 2 == 0) held = test::request(prefetcher, std::vector<int32_t>{6});
      for (auto dropped = random() % 3; dropped > 0; --dropped) {
        const std::vector<int32_t> ids(1 + random() % kMaxTokens, random() % 2 == 0 ? 7 : 8);
        const RowRequest request = test::request(prefetcher, ids);
        pause(random);
      }
      const std::vector<int32_t> ids = {9, static_cast<int32_t>(10 + random() % 40), 9};
      RowRequest request = test::request(prefetcher, ids);
      pause(random);
      request.wait();
      CHECK(fixture.holds(request, ids));
    }
  }
}

TEST_CASE("prefetcher: a read error reaches the waiter of its request alone, and the prefetcher goes on") {
  for (const bool asynchronous : {false, true}) {
    const Fixture fixture;
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
    std::mt19937 random(7);
    const std::vector<int32_t> bad = {1, 30, 30, 2};
    const std::vector<int32_t> good = {5, 6};
    for (int round = 0; round < 50; ++round) {
      fixture.source->damage(30);
      RowRequest failing = test::request(prefetcher, bad);
      RowRequest other = test::request(prefetcher, good);
      pause(random);
      for (int attempt = 0; attempt < 2; ++attempt) {
        check_names(error_of<PackageError>([&] { failing.wait(); }), "bundle 30");
      }
      other.wait();
      CHECK(fixture.holds(other, good));
      fixture.source->repair(30);
      failing = {};
      failing = test::request(prefetcher, bad);
      failing.wait();
      CHECK(fixture.holds(failing, bad));
    }
  }
}

TEST_CASE("prefetcher: a file that shrinks is an error of the waiter") {
  for (const RomAccess access : {RomAccess::mmap, RomAccess::pread, RomAccess::direct}) {
    const Fixture fixture(kInt8, access);
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, true);
    std::filesystem::resize_file(fixture.path, 4096);
    const std::vector<int32_t> ids = {3, 1, 2};
    RowRequest request = test::request(prefetcher, ids);
    check_names(error_of<PackageError>([&] { request.wait(); }), fixture.path.string());
  }
}

TEST_CASE("prefetcher: destruction at any moment of a read") {
  const Fixture fixture;
  std::mt19937 random(8);
  for (int round = 0; round < 200; ++round) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, round % 10 != 0);
    RowRequest held[kBuffers];
    for (auto request = random() % 4; request > 0; --request) {
      RowRequest& replaced = held[random() % kBuffers];
      replaced = {};
      replaced = test::request(prefetcher, random_ids(random));
      if (random() % 2 == 0) pause(random);
    }
  }
}

TEST_CASE("prefetcher: destruction in a forked child, where the I/O thread is not") {
  const Fixture fixture;
  const std::vector<int32_t> ids = {1, 2, 3};
  for (const bool waited : {false, true}) {
    auto prefetcher = std::make_unique<Prefetcher>(fixture.source, kMaxTokens, kBuffers, true);
    RowRequest request = test::request(*prefetcher, ids);
    if (waited) {
      request.wait();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the I/O thread sleeps again, as it mostly does
    }
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      ::alarm(10);  // a destructor that waits for the thread waits for ever
      request = {};
      prefetcher.reset();
      ::_exit(0);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    if (!waited) request.wait();
    CHECK(fixture.holds(request, ids));  // the parent has not noticed
  }
}

TEST_CASE("prefetcher: many on one ROM, each in a thread of its own") {
  constexpr int kThreads = 4;
  const Fixture fixture;
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&fixture, &right, thread] {
      std::mt19937 random(static_cast<uint32_t>(thread));
      Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, thread != 0);
      for (int round = 0; round < 50; ++round) {
        const std::vector<int32_t> ids = random_ids(random);
        RowRequest request = test::request(prefetcher, ids);
        pause(random);
        request.wait();
        if (fixture.holds(request, ids)) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == kThreads * 50);
}

TEST_CASE("prefetcher: slow storage is waited for, and the time of it is told") {
  constexpr std::chrono::milliseconds kDelay{2};
  const Fixture fixture;
  const std::vector<int32_t> ids = {4, 2, 4, 9};  // three bundles
  for (const bool asynchronous : {false, true}) {
    const auto slow = std::make_shared<const DelayedRows>(fixture.source, kDelay);
    Prefetcher prefetcher(slow, kMaxTokens, kBuffers, asynchronous);
    const auto start = std::chrono::steady_clock::now();
    RowRequest request = test::request(prefetcher, ids);
    const std::chrono::nanoseconds stall(request.wait());
    CHECK(std::chrono::steady_clock::now() - start >= 3 * kDelay);
    if (!asynchronous) CHECK(stall >= 3 * kDelay);
    CHECK(fixture.holds(request, ids));
  }
}

TEST_CASE("prefetcher: a request holds the free buffer of the lowest number until it is destroyed") {
  const Fixture fixture;
  const std::vector<int32_t> ids = {1, 2};
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, 3, asynchronous);
    CHECK(prefetcher.buffers() == 3);
    std::vector<RowRequest> held;
    for (size_t buffer = 0; buffer < 3; ++buffer) {
      held.push_back(test::request(prefetcher, ids));
      held.back().wait();
      CHECK(buffer_of(prefetcher, held.back()) == buffer);
      CHECK(held.back().rows() == prefetcher.rows(buffer));
    }
    check_names(error_of<std::logic_error>([&] { test::request(prefetcher, ids); }), "all 3 buffers");
    held[1] = std::move(held[2]);  // gives back buffer 1 at once
    CHECK_FALSE(held[2]);
    CHECK(buffer_of(prefetcher, held[1]) == 2);
    CHECK(fixture.holds(held[1], ids));
    CHECK(buffer_of(prefetcher, test::request(prefetcher, ids)) == 1);
    held[0] = {};
    CHECK_FALSE(held[0]);
    held[0] = test::request(prefetcher, ids);
    CHECK(buffer_of(prefetcher, held[0]) == 0);
  }
}

TEST_CASE("prefetcher: what is dropped before it has begun is never read") {
  const Fixture fixture;
  Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, false);
  for (int32_t id = 0; id < 10; ++id) {
    const RowRequest dropped = test::request(prefetcher, std::span(&id, 1));
  }
  CHECK(prefetcher.counters().requests == 0);
}

TEST_CASE("prefetcher: rows beyond the last token repeat it, read once") {
  const Fixture fixture;
  std::mt19937 random(9);
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
    for (int round = 0; round < 100; ++round) {
      std::vector<int32_t> ids = random_ids(random);
      const size_t distinct = std::set<int32_t>(ids.begin(), ids.end()).size();
      const size_t width = ids.size() + random() % (kMaxTokens - ids.size() + 1);
      const uint64_t before = prefetcher.counters().requests;
      RowRequest request = prefetcher.request(ids, 0, width);
      request.wait();
      ids.resize(width, ids.back());
      CHECK(fixture.holds(request, ids));
      CHECK(prefetcher.counters().requests - before == distinct);
    }
  }
}

TEST_CASE("prefetcher: no request allocates, not even its first") {
  const Fixture fixture;
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.source, kMaxTokens, kBuffers, asynchronous);
    std::mt19937 random(10);
    const std::vector<int32_t> chunk(kMaxTokens, 3);
    const std::vector<int32_t> one = {4};
    const uint64_t before = test::allocations();
    for (int round = 0; round < 50; ++round) {
      RowRequest request = test::request(prefetcher, chunk);
      RowRequest next = test::request(prefetcher, one);
      pause(random);
      request.wait();
      request = std::move(next);
      next = test::request(prefetcher, one);  // dropped
      request.wait();
    }
    const uint64_t made = test::allocations() - before;
    if (test::kCountsAllocations) CHECK(made == 0);
  }
}

}  // namespace
}  // namespace meki
