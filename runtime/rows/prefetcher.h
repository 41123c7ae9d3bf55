#pragma once

#include <sys/types.h>

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/rows/token_table.h"

namespace meki {

// What a prefetcher has read. Passive data.
struct RomCounters {
  uint64_t requests = 0;  // bundles read
  uint64_t bytes = 0;     // asked of the system
};

// Brings the memory rows of tokens from a ROM into float32 buffers on one I/O thread of its own, so that neither
// storage nor checksums nor widening cost the compute thread anything. That thread never preempts another one.
//
// There are two slots: one is filled while the other is in use. Each begin(slot) is followed by one wait(slot), or by
// another begin(slot), which drops the first result. All calls come from one thread. If the I/O thread has not even
// been scheduled when the rows are needed, wait() reads them itself: on busy cores that is sooner than a wake-up.
class Prefetcher {
 public:
  static constexpr int kSlots = 2;

  // Slots hold up to `max_tokens` tokens. Throws std::bad_alloc. Without `asynchronous` there is no thread and wait()
  // reads.
  Prefetcher(std::shared_ptr<const Rom> rom, size_t max_tokens, bool asynchronous);
  // Waits for the read in flight. (In a forked child there is none: it returns at once.)
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // Requests the rows of `ids` (1 to max_tokens of them, each < vocab_size) into `slot`. Returns at once unless the
  // slot's previous request is still running. Each distinct id is read once, in file order.
  void begin(int slot, std::span<const int32_t> ids);
  // Blocks until the slot's request is done; returns the nanoseconds spent here. Rethrows what the reading threw
  // (PackageError).
  uint64_t wait(int slot);
  // The slot's rows: float32 [layers, n, row_dim], n being the number of ids of its last request.
  float* rows(int slot) const { return slots_[static_cast<size_t>(slot)].rows.as<float>(); }

  RomCounters counters() const;

 private:
  enum class State { idle, queued, running, done };
  struct Slot {
    Mapping rows;
    Mapping scratch;  // for one bundle
    std::vector<int32_t> ids;
    std::vector<std::pair<int32_t, size_t>> order;  // (id, position), sorted
    State state = State::idle;
    std::exception_ptr error;
  };

  void serve();
  void perform(Slot& slot, std::unique_lock<std::mutex>& lock);
  void fill(Slot& slot, RomCounters& read);

  const std::shared_ptr<const Rom> rom_;
  const pid_t process_;
  struct Sync {
    std::mutex mutex;
    std::condition_variable work;
    std::condition_variable ready;
  };

  // A slot's memory belongs to whoever set its state to running, until it is done; everything else below is guarded by
  // the mutex.
  std::array<Slot, kSlots> slots_;
  std::unique_ptr<Sync> sync_ = std::make_unique<Sync>();
  RomCounters counters_;
  int next_ = 0;  // the slot to serve first when both are queued
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace meki
