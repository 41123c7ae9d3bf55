#include "runtime/base/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace meki {
namespace {

// Longer than what lies between two layers or, as a rule, two tokens; short enough to leave an idle machine idle.
constexpr std::chrono::microseconds kSpin{300};
constexpr std::chrono::microseconds kShortSpin{2};
constexpr int kChecks = 64;  // between two looks at the clock

constexpr size_t kMostPieces = UINT32_MAX;

// Pieces that are left, as Range has them.
constexpr uint64_t range(size_t begin, size_t end) { return begin | uint64_t{end} << 32; }
constexpr size_t begin_of(uint64_t range) { return static_cast<size_t>(range & UINT32_MAX); }
constexpr size_t end_of(uint64_t range) { return static_cast<size_t>(range >> 32); }
constexpr size_t size_of(uint64_t range) { return end_of(range) - begin_of(range); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) : process_(::getpid()), ranges_(std::max<size_t>(threads, 1)) {
  try {
    for (size_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  } catch (...) {
    stop_ = true;
    ++alarm_;
    alarm_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (::getpid() != process_) {
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  ++alarm_;
  alarm_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

Parallel ThreadPool::parallel() {
  return {workers_.size() + 1, this, [](void* pool, size_t pieces, Piece piece, void* data) {
            static_cast<ThreadPool*>(pool)->run(pieces, piece, data);
          }};
}

void ThreadPool::run(size_t pieces, Piece piece, void* data) {
  if (pieces > kMostPieces || busy_.test_and_set(std::memory_order_acquire)) {
    for (size_t index = 0; index < pieces; ++index) piece(data, index);
    return;
  }
  piece_ = piece;
  data_ = data;
  const size_t threads = ranges_.size();
  for (size_t i = 0; i < threads; ++i) {
    ranges_[i].pieces.store(range(pieces * i / threads, pieces * (i + 1) / threads), std::memory_order_relaxed);
  }
  open_.store(true);
  if (sleepers_.load() > 0) {
    ++alarm_;
    alarm_.notify_all();
  }
  take_pieces(0);
  open_.store(false);
  // What is still running takes microseconds, unless its thread has lost its core: then ours may be the one it needs.
  for (int turn = 0; active_.load() > 0; ++turn) {
    if (turn < 1000) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
  busy_.clear(std::memory_order_release);
}

void ThreadPool::take_pieces(size_t thread) {
  size_t index = 0;
  while (take_own(thread, index) || take_over(thread, index)) piece_(data_, index);
}

// False: the thread has none left.
bool ThreadPool::take_own(size_t thread, size_t& index) {
  std::atomic<uint64_t>& own = ranges_[thread].pieces;
  uint64_t left = own.load();
  while (size_of(left) > 0) {
    index = begin_of(left);
    if (own.compare_exchange_weak(left, range(index + 1, end_of(left)))) return true;
  }
  return false;
}

// Takes the first piece of the second half of what another thread has left; the rest of that half becomes the thread's
// own, which has none. False: nobody has any.
bool ThreadPool::take_over(size_t thread, size_t& index) {
  for (size_t i = 1; i < ranges_.size(); ++i) {
    std::atomic<uint64_t>& others = ranges_[(thread + i) % ranges_.size()].pieces;
    uint64_t left = others.load();
    while (size_of(left) > 0) {
      index = begin_of(left) + size_of(left) / 2;
      if (!others.compare_exchange_weak(left, range(begin_of(left), index))) continue;
      ranges_[thread].pieces.store(range(index + 1, end_of(left)));
      return true;
    }
  }
  return false;
}

void ThreadPool::serve(size_t thread) {
  Nanoseconds spin = kSpin;
  while (wait_for_work(spin)) {
    ++active_;
    if (open_.load()) take_pieces(thread);
    --active_;
  }
}

// False: the pool ends. A spin that was for nothing makes the next one shorter: where threads are more than cores, the
// caller may be waiting for this one's.
bool ThreadPool::wait_for_work(Nanoseconds& spin) {
  for (;;) {
    auto give_up = std::chrono::steady_clock::now() + spin;
    while (std::chrono::steady_clock::now() < give_up) {
      for (int check = 0; check < kChecks; ++check) {
        if (open_.load()) {
          spin = std::min<Nanoseconds>(2 * spin, kSpin);
          return true;
        }
        relax();
      }
      if (stop_) return false;
    }
    spin = std::max<Nanoseconds>(spin / 2, kShortSpin);
    const uint32_t alarm = alarm_.load();
    ++sleepers_;
    if (!open_.load() && !stop_) alarm_.wait(alarm);
    --sleepers_;
    if (stop_) return false;
  }
}

}  // namespace meki
