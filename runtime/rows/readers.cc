#include "runtime/rows/readers.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <utility>

namespace meki {

void give_way_to_compute() {
  const sched_param none{};
  ::pthread_setschedparam(::pthread_self(), SCHED_BATCH, &none);
}

Readers::Readers(size_t count) : process_(::getpid()) {
  try {
    for (size_t reader = 1; reader < count; ++reader) threads_.emplace_back([this, reader] { serve(reader); });
  } catch (...) {
    stop();
    throw;
  }
}

Readers::~Readers() {
  if (::getpid() != process_) {
    for (std::thread& thread : threads_) thread.detach();
    static_cast<void>(sync_.release());  // the threads of the parent are asleep on it
    return;
  }
  stop();
}

void Readers::stop() {
  {
    const std::lock_guard lock(sync_->mutex);
    stop_ = true;
  }
  sync_->begin.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Readers::run(size_t pieces, const Work& work) {
  const std::unique_lock caller(caller_, std::try_to_lock);
  if (!caller || pieces == 1) {
    for (size_t piece = 0; piece < pieces; ++piece) work(piece, 0);
    return;
  }
  std::unique_lock lock(sync_->mutex);
  work_ = &work;
  next_ = 0;
  pieces_ = pieces;
  sync_->begin.notify_all();
  take_pieces(0, lock);
  sync_->end.wait(lock, [this] { return active_ == 0; });
  pieces_ = next_ = 0;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

// While there is something to do, whoever holds the lock counts itself in `active_` and does it without the lock.
void Readers::take_pieces(size_t reader, std::unique_lock<std::mutex>& lock) {
  ++active_;
  while (next_ < pieces_) {
    const size_t piece = next_++;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*work_)(piece, reader);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (!error) continue;
    if (!error_) error_ = std::move(error);
    next_ = pieces_;
  }
  if (--active_ == 0) sync_->end.notify_one();
}

void Readers::serve(size_t reader) {
  give_way_to_compute();
  std::unique_lock lock(sync_->mutex);
  for (;;) {
    sync_->begin.wait(lock, [this] { return stop_ || next_ < pieces_; });
    if (stop_) return;
    take_pieces(reader, lock);
  }
}

}  // namespace meki
