#include "runtime/measure/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <latch>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/base/file.h"

namespace meki {

double read_bandwidth(size_t threads, size_t bytes) {
  constexpr size_t kLeast = size_t{1} << 20;
  if (threads == 0 || bytes / threads < kLeast) {
    throw std::invalid_argument(std::to_string(bytes) + " bytes for " + std::to_string(threads) +
                                " threads; expected at least one thread and 1 MiB for each");
  }
  using Clock = std::chrono::steady_clock;
  const size_t share = bytes / threads / 64 * 8;  // in words, whole cache lines
  const Mapping buffer = Mapping::zeroed(threads * share * sizeof(uint64_t));
  buffer.prefer_huge_pages();
  std::latch filled(static_cast<std::ptrdiff_t>(threads));
  std::atomic<uint64_t> sink{0};  // keeps the reading from being optimised away
  std::vector<Clock::time_point> begin(threads);
  std::vector<Clock::time_point> end(threads);
  std::vector<std::thread> workers;  // not jthread, which Android's libc++ counts as experimental
  workers.reserve(threads);
  for (size_t index = 0; index < threads; ++index) {
    workers.emplace_back([&, index] {
      uint64_t* const words = buffer.as<uint64_t>() + index * share;
      std::fill_n(words, share, index + 1);
      filled.arrive_and_wait();
      begin[index] = Clock::now();
      uint64_t sums[8] = {};
      for (size_t i = 0; i < share; i += 8) {
        for (size_t lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
      }
      end[index] = Clock::now();
      for (const uint64_t sum : sums) sink += sum;
    });
  }
  for (std::thread& worker : workers) worker.join();
  const auto elapsed = *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
  return static_cast<double>(buffer.size()) / std::chrono::duration<double>(elapsed).count();
}

}  // namespace meki
