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
// Each thread begins with an equal range of neighbouring pieces, whose memory it reads in a row: with a common counter,
// threads would alternate, and hardware that fetches ahead for one of them would fetch what another one reads. Who is
// done with his own pieces takes the second half of another's.
//
// Decode hands over work every few tens of microseconds, so an idle worker looks for more for a while (kSpin) before it
// sleeps. Nobody waits for a worker that has not come: whoever is there takes the pieces, and only a piece that a
// worker has begun is waited for (and what it has just taken over, if it loses its core within those nanoseconds). A
// core that is busy elsewhere costs its share of the work, not a time slice at every barrier.
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
  // The pieces of one thread that nobody has taken: begin in the low half, end in the high one. Whoever replaces a
  // value takes a piece of it, so that none comes back within a run.
  struct alignas(64) Range {
    std::atomic<uint64_t> pieces{0};
  };

  void run(size_t pieces, Piece piece, void* data);
  void take_pieces(size_t thread);
  bool take_own(size_t thread, size_t& index);
  bool take_over(size_t thread, size_t& index);
  void serve(size_t thread);
  bool wait_for_work(Nanoseconds& spin);

  const pid_t process_;
  std::atomic_flag busy_;  // a caller has the workers

  // The work. A worker counts itself in `active_` before it looks at `open_`, and the caller closes that before it
  // waits for `active_` to become 0: so the others change only while no worker can see them.
  alignas(64) std::atomic<bool> open_{false};
  std::vector<Range> ranges_;  // of the caller, then of each worker
  Piece piece_ = nullptr;
  void* data_ = nullptr;
  alignas(64) std::atomic<size_t> active_{0};

  alignas(64) std::atomic<size_t> sleepers_{0};
  std::atomic<uint32_t> alarm_{0};  // changes when sleepers are to wake up
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace meki
