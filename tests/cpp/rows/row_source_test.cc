// A source of hashed n-grams, as the seam of runtime/rows/row_source.h foresees it, behind the prefetcher: many small
// parts a token, which its neighbours decide, too. These tests also run under ThreadSanitizer.

#include "runtime/rows/row_source.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "runtime/rows/prefetcher.h"
#include "tests/cpp/rows/requests.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::buffer_of;

constexpr uint32_t kLayers = 3;
constexpr uint32_t kHeads = 4;
constexpr uint32_t kHeadDim = 5;
constexpr uint32_t kRowDim = kHeads * kHeadDim;
constexpr uint64_t kTable = 37;  // parts of one head: few, so that n-grams collide
constexpr size_t kHistory = 2;
constexpr size_t kMaxTokens = 24;
constexpr std::chrono::seconds kLong{20};  // a wait for ever, to a test

// Which part a head of a layer takes for a token after two earlier ones; -1 before the beginning.
uint64_t ngram_index(uint32_t layer, uint32_t head, int64_t before, int64_t previous, int64_t token) {
  const auto mixed = static_cast<uint64_t>((token + 2) * 31 + (previous + 2) * (layer + 7) + (before + 2) * (head + 3));
  return (layer * kHeads + head) * kTable + mixed % kTable;
}

float part_value(uint64_t index, uint32_t column) { return static_cast<float>(index * kHeadDim + column); }

// Notes what is asked of it. While its gate is closed, reads wait, but for those of the thread that made it.
class FakeNgrams final : public RowSource {
 public:
  explicit FakeNgrams(bool waits = false) : waits_(waits) {}
  RowShape shape() const override { return {kLayers, kRowDim}; }
  RowShape part() const override { return {1, kHeadDim}; }
  size_t keys_per_token() const override { return size_t{kLayers} * kHeads; }
  size_t history() const override { return kHistory; }
  void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const override {
    const auto token = [sequence](size_t back) {
      return back < sequence.size() ? int64_t{sequence[sequence.size() - 1 - back]} : -1;
    };
    auto key = out.begin();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (uint32_t head = 0; head < kHeads; ++head) {
        *key++ = {ngram_index(layer, head, token(2), token(1), token(0)), layer, head * kHeadDim};
      }
    }
  }
  size_t part_bytes() const override { return kHeadDim * sizeof(float); }
  size_t scratch_bytes() const override { return part_bytes(); }
  void advise(uint64_t index) const noexcept override {
    const std::lock_guard lock(mutex_);
    log_.advised.push_back(index);
    if (std::this_thread::get_id() == caller_) ++log_.advised_by_caller;
  }
  bool waits() const override { return waits_; }
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override {
    std::unique_lock lock(mutex_);
    log_.read.push_back(index);
    changed_.notify_all();
    changed_.wait_for(lock, kLong, [this] { return open_ || std::this_thread::get_id() == caller_; });
    for (uint32_t column = 0; column < kHeadDim; ++column) {
      const float value = part_value(index, column);
      std::memcpy(scratch.data() + column * sizeof(value), &value, sizeof(value));
    }
    return {scratch.first(part_bytes()), 3};
  }
  void widen(std::span<const std::byte> stored, float* out, size_t) const noexcept override {
    std::memcpy(out, stored.data(), stored.size());
  }
  void drop_cache() const noexcept override {}
  std::string_view access() const override { return "fake"; }

  struct Log {
    std::vector<uint64_t> advised;
    std::vector<uint64_t> read;
    size_t advised_by_caller = 0;
  };
  Log take_log() const {
    const std::lock_guard lock(mutex_);
    return std::exchange(log_, {});
  }
  void set_gate(bool open) const {
    const std::lock_guard lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }
  // Waits until so many reads have begun.
  void await_reads(size_t count) const {
    std::unique_lock lock(mutex_);
    REQUIRE(changed_.wait_for(lock, kLong, [this, count] { return log_.read.size() >= count; }));
  }
  void await_read() const { await_reads(1); }

 private:
  const bool waits_;
  const std::thread::id caller_ = std::this_thread::get_id();
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable bool open_ = true;
  mutable Log log_;
};

// The indices of one token's parts, and the rows of sequence[first..], as the definition has them.
std::vector<uint64_t> naive_indices(std::span<const int32_t> sequence, size_t position) {
  const auto at = [sequence, position](size_t back) {
    return back <= position ? int64_t{sequence[position - back]} : -1;
  };
  std::vector<uint64_t> indices;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (uint32_t head = 0; head < kHeads; ++head) {
      indices.push_back(ngram_index(layer, head, at(2), at(1), at(0)));
    }
  }
  return indices;
}

std::vector<float> naive_rows(std::span<const int32_t> sequence, size_t first, size_t width) {
  std::vector<float> rows;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (size_t token = 0; token < width; ++token) {
      const auto indices = naive_indices(sequence, std::min(first + token, sequence.size() - 1));
      for (uint32_t column = 0; column < kRowDim; ++column) {
        rows.push_back(part_value(indices[layer * kHeads + column / kHeadDim], column % kHeadDim));
      }
    }
  }
  return rows;
}

bool holds(const RowRequest& request, std::span<const int32_t> sequence, size_t first, size_t width) {
  const std::vector<float> expected = naive_rows(sequence, first, width);
  return std::equal(expected.begin(), expected.end(), request.rows());
}

std::vector<uint64_t> distinct_indices(std::span<const int32_t> sequence, size_t first) {
  std::set<uint64_t> indices;
  for (size_t position = first; position < sequence.size(); ++position) {
    for (const uint64_t index : naive_indices(sequence, position)) indices.insert(index);
  }
  return {indices.begin(), indices.end()};
}

TEST_CASE("prefetcher: rows of n-grams equal the naive reading, wherever in the sequence they begin") {
  for (const int kind : {0, 1, 2}) {
    const bool asynchronous = kind > 0;
    const bool side_by_side = kind > 1;
    const auto source = std::make_shared<const FakeNgrams>(side_by_side);
    Prefetcher prefetcher(source, kMaxTokens, 2, asynchronous);
    std::mt19937 random(1);
    uint64_t requests = 0;
    for (int round = 0; round < 200; ++round) {
      CAPTURE(round);
      std::vector<int32_t> sequence(1 + random() % 60);
      for (int32_t& token : sequence) token = static_cast<int32_t>(random() % (round % 2 == 0 ? 1000 : 3));
      const size_t count = 1 + random() % std::min(sequence.size(), kMaxTokens);
      const size_t first = sequence.size() - count;
      const size_t width = count + random() % (kMaxTokens - count + 1);
      RowRequest request = prefetcher.request(sequence, first, width);
      if (random() % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      request.wait();
      CHECK(holds(request, sequence, first, width));
      // Each once, in the order of the file, and the system was told of all before.
      const std::vector<uint64_t> expected = distinct_indices(sequence, first);
      FakeNgrams::Log log = source->take_log();
      if (side_by_side) std::sort(log.read.begin(), log.read.end());
      CHECK(log.read == expected);
      CHECK(std::set<uint64_t>(log.advised.begin(), log.advised.end()) ==
            std::set<uint64_t>(expected.begin(), expected.end()));
      requests += expected.size();
      CHECK(prefetcher.counters().requests == requests);
      CHECK(prefetcher.counters().bytes == 3 * requests);
    }
  }
}

TEST_CASE("prefetcher: where reads wait for storage, those of a token do it side by side") {
  const auto source = std::make_shared<const FakeNgrams>(true);
  const std::vector<int32_t> sequence = {4, 5, 6};
  Prefetcher prefetcher(source, kMaxTokens, 2, true);
  source->set_gate(false);
  RowRequest request = test::request(prefetcher, sequence, 2);
  source->await_reads(distinct_indices(sequence, 2).size());  // all of them, and none has ended
  CHECK(prefetcher.counters().requests == 0);
  source->set_gate(true);
  request.wait();
  CHECK(holds(request, sequence, 2, 1));
}

TEST_CASE("prefetcher: destruction in a forked child, where its readers are not") {
  const auto source = std::make_shared<const FakeNgrams>(true);
  const std::vector<int32_t> sequence = {4, 5, 6};
  auto prefetcher = std::make_unique<Prefetcher>(source, kMaxTokens, 2, true);
  RowRequest request = test::request(*prefetcher, sequence, 2);
  request.wait();
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::alarm(10);  // a destructor that waits for a thread waits for ever
    request = {};
    prefetcher.reset();
    ::_exit(0);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(holds(request, sequence, 2, 1));  // the parent has not noticed
}

TEST_CASE("prefetcher: storage is told of all parts of a single token by the thread that requests it") {
  const auto source = std::make_shared<const FakeNgrams>();
  const std::vector<int32_t> sequence = {4, 5, 6, 7};
  Prefetcher prefetcher(source, kMaxTokens, 1, true);
  for (int round = 0; round < 20; ++round) {
    RowRequest request = test::request(prefetcher, sequence, 3);
    const FakeNgrams::Log at_once = source->take_log();
    CHECK(at_once.advised == naive_indices(sequence, 3));
    CHECK(at_once.advised_by_caller == at_once.advised.size());
    request.wait();
    CHECK(source->take_log().advised.empty());  // and only once
  }
}

TEST_CASE("prefetcher: the I/O thread begins the oldest request; who waits for one that has not begun reads it") {
  const auto source = std::make_shared<const FakeNgrams>();
  const std::vector<int32_t> sequence = {4, 5, 6, 7, 8};
  Prefetcher prefetcher(source, kMaxTokens, 3, true);
  source->set_gate(false);
  RowRequest requests[3];
  requests[0] = test::request(prefetcher, std::span(sequence).first(3), 2);
  source->await_read();
  CHECK(source->take_log().read.front() == distinct_indices(std::span(sequence).first(3), 2).front());
  // The buffer of the second is the higher one, so that no order of buffers could pass for the order of requests.
  RowRequest spare = test::request(prefetcher, sequence, 4);
  requests[1] = test::request(prefetcher, std::span(sequence).first(4), 3);
  spare = {};
  requests[2] = test::request(prefetcher, sequence, 4);
  CHECK(buffer_of(prefetcher, requests[1]) > buffer_of(prefetcher, requests[2]));
  source->set_gate(true);
  requests[0].wait();
  // Give the I/O thread time for the others: they come in the order of their requests.
  std::vector<uint64_t> expected = distinct_indices(std::span(sequence).first(3), 2);
  for (const size_t last : {4, 5}) {
    const auto indices = distinct_indices(std::span(sequence).first(last), last - 1);
    expected.insert(expected.end(), indices.begin(), indices.end());
  }
  for (int i = 0; i < 2000 && prefetcher.counters().requests < expected.size(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  expected.erase(expected.begin());  // taken above
  CHECK(source->take_log().read == expected);
  for (size_t i = 0; i < 3; ++i) {
    requests[i].wait();
    CHECK(holds(requests[i], std::span(sequence).first(3 + i), 2 + i, 1));
  }
}

TEST_CASE("prefetcher: a request is read by who waits for it while the I/O thread is held up by another") {
  const auto source = std::make_shared<const FakeNgrams>();
  const std::vector<int32_t> sequence = {4, 5, 6};
  Prefetcher prefetcher(source, kMaxTokens, 2, true);
  source->set_gate(false);
  RowRequest held_up = test::request(prefetcher, std::span(sequence).first(2), 1);
  source->await_read();
  RowRequest request = test::request(prefetcher, sequence, 2);
  request.wait();
  CHECK(holds(request, sequence, 2, 1));
  CHECK(prefetcher.counters().requests == distinct_indices(sequence, 2).size());
  source->set_gate(true);
  held_up.wait();
  CHECK(holds(held_up, std::span(sequence).first(2), 1, 1));
}

TEST_CASE("prefetcher: to drop a read in flight does not wait for it; to need its buffer does") {
  const auto source = std::make_shared<const FakeNgrams>();
  const std::vector<int32_t> sequence = {4, 5, 6};
  Prefetcher prefetcher(source, kMaxTokens, 2, true);
  source->set_gate(false);
  RowRequest dropped = test::request(prefetcher, std::span(sequence).first(2), 1);
  source->await_read();
  dropped = {};
  RowRequest other = test::request(prefetcher, std::span(sequence).first(1));
  CHECK(buffer_of(prefetcher, other) == 1);
  std::atomic<bool> opened = false;
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    opened = true;
    source->set_gate(true);
  });
  RowRequest request = test::request(prefetcher, sequence, 2);
  CHECK(opened);
  CHECK(buffer_of(prefetcher, request) == 0);
  opener.join();
  request.wait();
  CHECK(holds(request, sequence, 2, 1));
  other.wait();
  CHECK(holds(other, std::span(sequence).first(1), 0, 1));
}

}  // namespace
}  // namespace meki
