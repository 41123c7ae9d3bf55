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

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) : process_(::getpid()) {
  try {
    for (size_t i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
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
  if (busy_.test_and_set(std::memory_order_acquire)) {
    for (size_t index = 0; index < pieces; ++index) piece(data, index);
    return;
  }
  pieces_ = pieces;
  piece_ = piece;
  data_ = data;
  next_.store(0);
  if (sleepers_.load() > 0) {
    ++alarm_;
    alarm_.notify_all();
  }
  take_pieces();
  next_.store(kClosed);
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

void ThreadPool::take_pieces() {
  for (;;) {
    const uint64_t index = next_.fetch_add(1);
    if (index >= pieces_) return;
    piece_(data_, static_cast<size_t>(index));
  }
}

void ThreadPool::serve() {
  Nanoseconds spin = kSpin;
  while (wait_for_work(spin)) {
    ++active_;
    if (next_.load() < kClosed) take_pieces();
    --active_;
  }
}

// False: the pool ends. A spin that was for nothing makes the next one shorter: where threads are more than cores, the
// caller may be waiting for this one's.
bool ThreadPool::wait_for_work(Nanoseconds& spin) {
  const auto is_open = [this] { return next_.load() < kClosed; };
  for (;;) {
    auto give_up = std::chrono::steady_clock::now() + spin;
    while (std::chrono::steady_clock::now() < give_up) {
      for (int check = 0; check < kChecks; ++check) {
        if (is_open()) {
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
    if (!is_open() && !stop_) alarm_.wait(alarm);
    --sleepers_;
    if (stop_) return false;
  }
}

}  // namespace meki
