// runtime/rom/prefetcher. These tests also run under ThreadSanitizer.

#include "runtime/rows/prefetcher.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <random>
#include <set>
#include <thread>

#include "runtime/base/error.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::kFloat16;
using test::kFloat32;
using test::kInt4;
using test::kInt8;
using test::RomImage;
using test::TempDir;

constexpr size_t kMaxTokens = 24;

// A ROM file and what is in it.
struct Fixture {
  explicit Fixture(uint32_t row_type = kInt8, RomAccess access = RomAccess::mmap)
      : image({.vocab_size = 50, .layers = 3, .row_dim = 21, .row_type = row_type}, row_type) {
    test::write_file(path, image.bytes);
    rom = std::make_shared<const Rom>(path, access);
  }
  // Whether `slot` holds the rows of `ids`.
  bool holds(const Prefetcher& prefetcher, int slot, std::span<const int32_t> ids) const {
    const std::vector<float> expected = image.rows(ids);
    return std::equal(expected.begin(), expected.end(), prefetcher.rows(slot));
  }
  void damage(uint32_t token) const {
    const uint8_t bad[] = {static_cast<uint8_t>(~image.payload(token)[0])};
    test::patch_file(path, image.offset(token), bad);
  }
  void repair(uint32_t token) const { test::patch_file(path, image.offset(token), image.payload(token)); }

  TempDir dir;
  std::filesystem::path path = dir / "memory.rom";
  RomImage image;
  std::shared_ptr<const Rom> rom;
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
        Prefetcher prefetcher(fixture.rom, kMaxTokens, asynchronous);
        std::mt19937 random(row_type);
        uint64_t requests = 0;
        uint64_t bytes = 0;
        for (int round = 0; round < 40; ++round) {
          CAPTURE(round);
          const std::vector<int32_t> ids = random_ids(random);
          const int slot = static_cast<int>(random() % 2);
          prefetcher.begin(slot, ids);
          pause(random);
          prefetcher.wait(slot);
          CHECK(fixture.holds(prefetcher, slot, ids));
          for (const int32_t id : std::set<int32_t>(ids.begin(), ids.end())) {
            ++requests;
            bytes += fixture.rom->request_bytes(static_cast<uint32_t>(id));
          }
          CHECK(prefetcher.counters().requests == requests);
          CHECK(prefetcher.counters().bytes == bytes);
        }
      }
    }
  }
}

TEST_CASE("prefetcher: one slot is filled while the other is in use, in memory that stays") {
  const Fixture fixture;
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.rom, kMaxTokens, asynchronous);
    const float* const memory[] = {prefetcher.rows(0), prefetcher.rows(1)};
    std::mt19937 random(5);
    std::vector<int32_t> ids = random_ids(random);
    prefetcher.begin(0, ids);
    for (int round = 0; round < 200; ++round) {
      const int slot = round % 2;
      std::vector<int32_t> next = random_ids(random);
      const std::vector<int32_t> kept = next;
      prefetcher.begin(1 - slot, next);
      next.assign(next.size(), 0);  // begin() took a copy
      pause(random);
      prefetcher.wait(slot);
      CHECK(fixture.holds(prefetcher, slot, ids));
      CHECK(prefetcher.rows(slot) == memory[slot]);
      ids = kept;
    }
  }
}

TEST_CASE("prefetcher: two requests are answered in either order of waiting") {
  const Fixture fixture;
  const std::vector<int32_t> ids[] = {{1, 2, 3}, {4, 3, 2, 49}};
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.rom, kMaxTokens, asynchronous);
    for (int round = 0; round < 100; ++round) {
      const int first = round / 2 % 2;
      prefetcher.begin(round % 2, ids[round % 2]);
      prefetcher.begin(1 - round % 2, ids[1 - round % 2]);
      prefetcher.wait(first);
      prefetcher.wait(1 - first);
      CHECK(fixture.holds(prefetcher, 0, ids[0]));
      CHECK(fixture.holds(prefetcher, 1, ids[1]));
    }
  }
}

TEST_CASE("prefetcher: another begin drops the first result, be it queued, running, done or failed") {
  const Fixture fixture;
  fixture.damage(7);
  for (const bool asynchronous : {false, true}) {
    Prefetcher prefetcher(fixture.rom, kMaxTokens, asynchronous);
    std::mt19937 random(6);
    for (int round = 0; round < 200; ++round) {
      CAPTURE(round);
      const int slot = static_cast<int>(random() % 2);
      for (auto dropped = random() % 3; dropped > 0; --dropped) {
        prefetcher.begin(slot, std::vector<int32_t>(1 + random() % kMaxTokens, random() % 2 == 0 ? 7 : 8));
        pause(random);
      }
      const std::vector<int32_t> ids = {9, static_cast<int32_t>(10 + random() % 40), 9};
      prefetcher.begin(slot, ids);
      pause(random);
      prefetcher.wait(slot);
      CHECK(fixture.holds(prefetcher, slot, ids));
    }
  }
}

TEST_CASE("prefetcher: a read error reaches the waiter of its slot alone, and the prefetcher goes on") {
  for (const bool asynchronous : {false, true}) {
    const Fixture fixture;
    Prefetcher prefetcher(fixture.rom, kMaxTokens, asynchronous);
    std::mt19937 random(7);
    const std::vector<int32_t> bad = {1, 30, 30, 2};
    const std::vector<int32_t> good = {5, 6};
    for (int round = 0; round < 50; ++round) {
      const int slot = round % 2;
      fixture.damage(30);
      prefetcher.begin(slot, bad);
      prefetcher.begin(1 - slot, good);
      pause(random);
      check_names(error_of<PackageError>([&] { prefetcher.wait(slot); }), "token 30");
      prefetcher.wait(1 - slot);
      CHECK(fixture.holds(prefetcher, 1 - slot, good));
      fixture.repair(30);
      prefetcher.begin(slot, bad);
      prefetcher.wait(slot);
      CHECK(fixture.holds(prefetcher, slot, bad));
    }
  }
}

TEST_CASE("prefetcher: a file that shrinks is an error of the waiter") {
  for (const RomAccess access : {RomAccess::mmap, RomAccess::pread, RomAccess::direct}) {
    const Fixture fixture(kInt8, access);
    Prefetcher prefetcher(fixture.rom, kMaxTokens, true);
    std::filesystem::resize_file(fixture.path, 4096);
    const std::vector<int32_t> ids = {3, 1, 2};
    prefetcher.begin(0, ids);
    check_names(error_of<PackageError>([&] { prefetcher.wait(0); }), fixture.path.string());
  }
}

TEST_CASE("prefetcher: destruction at any moment of a read") {
  const Fixture fixture;
  std::mt19937 random(8);
  for (int round = 0; round < 200; ++round) {
    Prefetcher prefetcher(fixture.rom, kMaxTokens, round % 10 != 0);
    for (auto request = random() % 4; request > 0; --request) {
      prefetcher.begin(static_cast<int>(random() % 2), random_ids(random));
      if (random() % 2 == 0) pause(random);
    }
  }
}

TEST_CASE("prefetcher: destruction in a forked child, where the I/O thread is not") {
  const Fixture fixture;
  const std::vector<int32_t> ids = {1, 2, 3};
  for (const bool waited : {false, true}) {
    auto prefetcher = std::make_unique<Prefetcher>(fixture.rom, kMaxTokens, true);
    prefetcher->begin(0, ids);
    if (waited) {
      prefetcher->wait(0);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the I/O thread sleeps again, as it mostly does
    }
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      ::alarm(10);  // a destructor that waits for the thread waits for ever
      prefetcher.reset();
      ::_exit(0);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    if (!waited) prefetcher->wait(0);
    CHECK(fixture.holds(*prefetcher, 0, ids));  // the parent has not noticed
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
      Prefetcher prefetcher(fixture.rom, kMaxTokens, thread != 0);
      for (int round = 0; round < 50; ++round) {
        const std::vector<int32_t> ids = random_ids(random);
        prefetcher.begin(round % 2, ids);
        pause(random);
        prefetcher.wait(round % 2);
        if (fixture.holds(prefetcher, round % 2, ids)) ++right;
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
    Prefetcher prefetcher(std::make_shared<const Rom>(fixture.path, RomAccess::mmap, kDelay), kMaxTokens, asynchronous);
    const auto start = std::chrono::steady_clock::now();
    prefetcher.begin(0, ids);
    const std::chrono::nanoseconds stall(prefetcher.wait(0));
    CHECK(std::chrono::steady_clock::now() - start >= 3 * kDelay);
    if (!asynchronous) CHECK(stall >= 3 * kDelay);
    CHECK(fixture.holds(prefetcher, 0, ids));
  }
}

}  // namespace
}  // namespace meki
