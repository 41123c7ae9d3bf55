// runtime/rows/row_cache over a source that counts. These tests also run under ThreadSanitizer.

#include "runtime/rows/row_cache.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>

#include "runtime/base/error.h"
#include "runtime/measure/process.h"
#include "runtime/rows/delayed_rows.h"
#include "runtime/rows/prefetcher.h"
#include "tests/cpp/allocations.h"
#include "tests/cpp/rows/faulty_rows.h"
#include "tests/cpp/rows/requests.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::FaultyRows;

constexpr size_t kEntry = 20;  // bytes that it takes to find a part, at most

// A part is `values` numbers of its own, whatever its index.
class Numbers final : public RowSource {
 public:
  explicit Numbers(uint32_t values) : values_(values) {}
  RowShape shape() const override { return {1, values_}; }
  RowShape part() const override { return shape(); }
  size_t keys_per_token() const override { return 1; }
  size_t history() const override { return 0; }
  void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const override {
    out.front() = {static_cast<uint64_t>(sequence.back()), 0, 0};
  }
  size_t part_bytes() const override { return values_ * sizeof(uint64_t); }
  size_t scratch_bytes() const override { return part_bytes() + 1; }
  void advise(uint64_t) const noexcept override { ++advised; }
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override {
    ++fetched;
    for (uint64_t i = 0; i < values_; ++i) {
      const uint64_t value = index * 31 + i;
      std::memcpy(scratch.data() + 1 + i * sizeof(value), &value, sizeof(value));
    }
    return {scratch.subspan(1), part_bytes() + 5};  // neither where scratch begins nor as many bytes as there are
  }
  void widen(std::span<const std::byte> stored, float* out, size_t) const noexcept override {
    for (size_t i = 0; i < values_; ++i) {
      uint64_t value = 0;
      std::memcpy(&value, stored.data() + i * sizeof(value), sizeof(value));
      out[i] = static_cast<float>(value % 65'521);
    }
  }
  void drop_cache() const noexcept override { ++drops; }
  std::string_view access() const override { return "numbers"; }

  mutable std::atomic<size_t> fetched = 0;
  mutable std::atomic<size_t> advised = 0;
  mutable std::atomic<size_t> drops = 0;

 private:
  const uint32_t values_;
};

// A cache before Numbers with room for `parts`, and the memory of one who reads from it.
struct Fixture {
  explicit Fixture(size_t parts, uint32_t values = 3)
      : numbers(std::make_shared<const Numbers>(values)),
        cache(with_row_cache(numbers, parts * (numbers->part_bytes() + kEntry))),
        scratch(numbers->scratch_bytes()),
        out(values) {}

  // Whether a part came from the cache; fails the test unless its values are right.
  bool hits(uint64_t index) {
    const size_t before = numbers->fetched;
    const size_t bytes = cache->read(index, scratch, out.data(), out.size());
    bool right = true;
    for (uint64_t i = 0; i < out.size(); ++i) {
      right = right && out[i] == static_cast<float>((index * 31 + i) % 65'521);
    }
    CHECK(right);
    const bool hit = numbers->fetched == before;
    CHECK(bytes == (hit ? 0 : numbers->part_bytes() + 5));
    return hit;
  }
  // Whether a part is in the cache, which does not count as a use: what is there needs no advice.
  bool holds(uint64_t index) const {
    const size_t before = numbers->advised;
    cache->advise(index);
    return numbers->advised == before;
  }
  size_t held(uint64_t end) const {
    size_t count = 0;
    for (uint64_t index = 0; index < end; ++index) count += holds(index) ? 1 : 0;
    return count;
  }

  std::shared_ptr<const Numbers> numbers;
  std::shared_ptr<const RowSource> cache;
  std::vector<std::byte> scratch;
  std::vector<float> out;
};

TEST_CASE("row cache: up to 127 parts it is one list, used parts first, new ones in at three quarters") {
  for (const size_t room : {1, 2, 3, 4, 10, 64, 127}) {
    CAPTURE(room);
    Fixture fixture(room);
    std::vector<uint64_t> list;  // the definition
    std::mt19937_64 random(room);
    size_t hits = 0;
    for (int round = 0; round < 4000; ++round) {
      CAPTURE(round);
      const uint64_t range = round % 1000 < 500 ? room + 2 : 4 * room;
      const uint64_t index = round % 7 == 0 ? random() : random() % range;  // some once and never again
      const auto found = std::find(list.begin(), list.end(), index);
      const bool expected = found != list.end();
      if (expected) {
        list.erase(found);
        list.insert(list.begin(), index);
      } else {
        if (list.size() == room) list.pop_back();
        list.insert(list.begin() + static_cast<std::ptrdiff_t>(std::min(list.size(), room * 3 / 4)), index);
      }
      CHECK(fixture.hits(index) == expected);
      hits += expected ? 1 : 0;
    }
    CHECK(hits > 100);
    for (const uint64_t index : list) CHECK(fixture.holds(index));
  }
}

TEST_CASE("row cache: it fills up to its bytes and not beyond, and uses nearly all of them") {
  for (const size_t room : {1, 5, 63, 64, 100, 128, 1000, 2335, 5000}) {
    CAPTURE(room);
    Fixture fixture(room);
    const uint64_t end = 4 * room;
    for (uint64_t index = 0; index < end; ++index) CHECK_FALSE(fixture.hits(index));
    const size_t held = fixture.held(end);
    CHECK(held <= room);
    CHECK(held >= room - room / 64);
  }
}

TEST_CASE("row cache: parts that are used once do not drive out those in use") {
  constexpr size_t kRoom = 2048;
  Fixture fixture(kRoom);
  constexpr uint64_t kHot = 1000;
  for (int round = 0; round < 3; ++round) {
    for (uint64_t index = 0; index < kHot; ++index) fixture.hits(index);
  }
  for (uint64_t index = kHot; index < kHot + 20 * kRoom; ++index) fixture.hits(index);
  CHECK(fixture.held(kHot) == kHot);
}

TEST_CASE("row cache: indices of any kind spread over the sets") {
  for (const uint64_t stride : {uint64_t{1}, uint64_t{2}, uint64_t{64}, uint64_t{151'680}, uint64_t{1} << 32}) {
    CAPTURE(stride);
    constexpr size_t kRoom = 64 * 64;
    Fixture fixture(kRoom);
    // Half as many as there is room for: sets that are hit by more than their share lose some.
    for (uint64_t i = 0; i < kRoom / 2; ++i) fixture.hits(i * stride);
    size_t kept = 0;
    for (uint64_t i = 0; i < kRoom / 2; ++i) kept += fixture.holds(i * stride) ? 1 : 0;
    CHECK(kept >= kRoom / 2 * 99 / 100);
  }
}

TEST_CASE("row cache: without room for a part there is none") {
  const auto numbers = std::make_shared<const Numbers>(3);
  CHECK(with_row_cache(numbers, 0) == numbers);
  CHECK(with_row_cache(numbers, numbers->part_bytes()) == numbers);
  CHECK(with_row_cache(numbers, numbers->part_bytes() + kEntry) != numbers);
}

TEST_CASE("row cache: a dropped one is empty, as is what the source has in memory") {
  Fixture fixture(200);
  for (int round = 0; round < 3; ++round) {
    for (uint64_t index = 0; index < 100; ++index) CHECK_FALSE(fixture.hits(index));
    CHECK(fixture.held(100) == 100);
    fixture.cache->drop_cache();
    CHECK(fixture.numbers->drops == static_cast<size_t>(round) + 1);
    CHECK(fixture.held(100) == 0);
  }
}

TEST_CASE("row cache: what could not be read is not there, what was read stays good") {
  const auto numbers = std::make_shared<const Numbers>(3);
  const auto faulty = std::make_shared<const FaultyRows>(numbers);
  const auto cache = with_row_cache(faulty, 1 << 20);
  std::vector<std::byte> scratch(cache->scratch_bytes());
  float out[3];
  faulty->damage(7);
  for (int tries = 0; tries < 2; ++tries) {
    check_names(error_of<PackageError>([&] { cache->read(7, scratch, out, 3); }), "bundle 7");
    CHECK(numbers->fetched == 0);
  }
  faulty->repair(7);
  CHECK(cache->read(7, scratch, out, 3) > 0);
  faulty->damage(7);
  CHECK(cache->read(7, scratch, out, 3) == 0);
  CHECK(out[2] == 7 * 31 + 2);
}

TEST_CASE("row cache: readers at once get the right parts, while some fail and all is dropped") {
  const auto numbers = std::make_shared<const Numbers>(5);
  const auto faulty = std::make_shared<const FaultyRows>(numbers);
  const auto cache = with_row_cache(faulty, 300 * (numbers->part_bytes() + kEntry));
  std::atomic<int> wrong = 0;
  std::atomic<int> failed = 0;
  std::atomic<int> hits = 0;
  const auto work = [&](uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<std::byte> scratch(cache->scratch_bytes());
    float out[5];
    for (int round = 0; round < 3000; ++round) {
      const uint64_t index = random() % (random() % 2 == 0 ? 20 : 1000);
      cache->advise(index);
      if (round % 100 == 0) faulty->damage(index);
      if (round % 100 == 50) faulty->repair(index);
      if (round % 1000 == 999) cache->drop_cache();
      try {
        hits += cache->read(index, scratch, out, 5) == 0 ? 1 : 0;
        for (uint64_t i = 0; i < 5; ++i) wrong += out[i] != static_cast<float>((index * 31 + i) % 65'521);
      } catch (const PackageError&) {
        ++failed;
      }
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t seed = 1; seed <= 4; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(failed > 0);
  CHECK(hits > 1000);
}

TEST_CASE("row cache: the delay of a slow source is not paid for what is here") {
  constexpr std::chrono::milliseconds kDelay{20};
  const auto slow = std::make_shared<const DelayedRows>(std::make_shared<const Numbers>(3), kDelay);
  const auto cache = with_row_cache(slow, 1 << 20);
  std::vector<std::byte> scratch(cache->scratch_bytes());
  float out[3];
  CHECK(cache->read(1, scratch, out, 3) > 0);
  const auto start = std::chrono::steady_clock::now();
  for (int round = 0; round < 1000; ++round) CHECK(cache->read(1, scratch, out, 3) == 0);
  CHECK(std::chrono::steady_clock::now() - start < 1000 * kDelay / 2);
}

TEST_CASE("row cache: a prefetcher counts hits, and what it brings is the same") {
  Fixture fixture(100);
  Prefetcher prefetcher(fixture.cache, 8, 1, true);
  const auto rows = [&](std::vector<int32_t> ids) {
    RowRequest request = test::request(prefetcher, ids);
    request.wait();
    for (size_t token = 0; token < ids.size(); ++token) {
      CHECK(request.rows()[3 * token] == static_cast<float>(ids[token] * 31));
    }
    return prefetcher.counters();
  };
  CHECK(rows({4, 5, 4, 6}).hits == 0);  // 4 is fetched once: the second one is no hit, but the same request
  RowCounters counters = rows({5, 7, 6});
  CHECK(counters.requests == 6);
  CHECK(counters.hits == 2);
  CHECK(counters.bytes == 4 * (fixture.numbers->part_bytes() + 5));
  counters = rows({7});
  CHECK(counters.hits == 3);
  CHECK(fixture.numbers->advised == 4);
}

TEST_CASE("row cache: it takes memory as it fills, up to its bytes, and allocates nothing") {
  if (!test::kCountsAllocations) return;  // a sanitizer's shadow is resident, too
  constexpr size_t kBytes = size_t{64} << 20;
  constexpr size_t kSlack = size_t{8} << 20;
  const auto anonymous = [] { return bench::resident_memory().value().anonymous; };
  std::vector<std::byte> warm(kSlack);  // the allocator's own pages are not to be counted below
  const auto numbers = std::make_shared<const Numbers>(512);
  std::vector<std::byte> scratch(numbers->scratch_bytes());
  std::vector<float> out(512);
  const size_t before = anonymous();
  const auto cache = with_row_cache(numbers, kBytes);
  CHECK(anonymous() < before + kSlack);
  const uint64_t allocations = test::allocations();
  for (uint64_t index = 0; index < 3 * kBytes / numbers->part_bytes(); ++index) {
    cache->read(index, scratch, out.data(), out.size());
  }
  CHECK(test::allocations() == allocations);
  const size_t after = anonymous();
  CHECK(after > before + kBytes - kSlack);
  CHECK(after < before + kBytes + kSlack);
}

TEST_CASE("row cache: what the system does not give is an error that says so") {
  const auto numbers = std::make_shared<const Numbers>(512);
  const std::string message =
      error_of<std::runtime_error>([&] { with_row_cache(numbers, std::numeric_limits<size_t>::max() / 2); });
  check_names(message, "the row cache needs ");
  check_names(message, "choose a smaller one");
}

}  // namespace
}  // namespace meki
