#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "runtime/base/parallel.h"

namespace meki {

// Threads that share the pieces of one piece of work after another.
//
// Decode hands over work every few tens of microseconds, so an idle worker looks for more for a while (kSpin) before it
// sleeps. Nobody waits for a worker that has not come: whoever is there takes the pieces, and only a piece that a
// worker has begun is waited for. A core that is busy elsewhere costs its share of the work, not a time slice at every
// barrier.
//
// One caller at a time has the workers; a second one that comes meanwhile does its work alone. Thread-safe.
class ThreadPool {
 public:
  // `threads` counts the caller's. Throws std::system_error if the system gives no thread.
  explicit ThreadPool(size_t threads);
  // (In a forked child there are no workers: it returns at once.)
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Parallel parallel();

 private:
  using Nanoseconds = std::chrono::nanoseconds;
  using Piece = void (*)(void* data, size_t index);
  static constexpr uint64_t kClosed = uint64_t{1} << 62;  // as `next_`: there is no work

  void run(size_t pieces, Piece piece, void* data);
  void take_pieces();
  void serve();
  bool wait_for_work(Nanoseconds& spin);

  const pid_t process_;
  std::atomic_flag busy_;  // a caller has the workers

  // The work. A worker counts itself in `active_` before it looks at `next_`, and the caller closes `next_` before it
  // waits for `active_` to become 0: so the other three change only while no worker can see them.
  alignas(64) std::atomic<uint64_t> next_{kClosed};  // the next piece to take
  size_t pieces_ = 0;
  Piece piece_ = nullptr;
  void* data_ = nullptr;
  alignas(64) std::atomic<size_t> active_{0};

  alignas(64) std::atomic<size_t> sleepers_{0};
  std::atomic<uint32_t> alarm_{0};  // changes when sleepers are to wake up
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace meki
