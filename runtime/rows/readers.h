#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace meki {

// For threads that bring rows: they take a core that is free, or their turn, but never interrupt a compute thread by
// waking up.
void give_way_to_compute();

// Threads that wait for storage together, asleep whenever there is nothing to read. One caller at a time has them; a
// second one that comes meanwhile works alone. Thread-safe.
class Readers {
 public:
  // piece: number of what is to be done; reader: who does it, 0 (the caller) to count() - 1.
  using Work = std::function<void(size_t piece, size_t reader)>;

  // `count` has the caller of run() in it. Throws std::system_error if the system gives no thread.
  explicit Readers(size_t count);
  // (In a forked child there are no threads: it returns at once.)
  ~Readers();
  Readers(const Readers&) = delete;
  Readers& operator=(const Readers&) = delete;

  size_t count() const { return threads_.size() + 1; }
  // Does all pieces and returns when they are done. Rethrows what the first that failed threw; others may be left out.
  void run(size_t pieces, const Work& work);

 private:
  struct Sync {
    std::mutex mutex;
    std::condition_variable begin;
    std::condition_variable end;
  };
  void stop();
  void serve(size_t reader);
  void take_pieces(size_t reader, std::unique_lock<std::mutex>& lock);

  const pid_t process_;
  std::mutex caller_;
  std::unique_ptr<Sync> sync_ = std::make_unique<Sync>();
  // Guarded by the mutex of sync_.
  const Work* work_ = nullptr;
  size_t next_ = 0;
  size_t pieces_ = 0;
  size_t active_ = 0;
  std::exception_ptr error_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace meki
