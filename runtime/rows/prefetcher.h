#pragma once

#include <sys/types.h>

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
#include "runtime/rows/readers.h"
#include "runtime/rows/row_source.h"

namespace meki {

class Prefetcher;

// What a prefetcher has brought. Passive data.
struct RowCounters {
  uint64_t requests = 0;  // parts
  uint64_t hits = 0;      // of these: were in memory; the others were read
  uint64_t bytes = 0;     // asked of the system

  RowCounters& operator+=(const RowCounters& other) {
    requests += other.requests;
    hits += other.hits;
    bytes += other.bytes;
    return *this;
  }
  RowCounters operator-(const RowCounters& other) const {
    return {requests - other.requests, hits - other.hits, bytes - other.bytes};
  }
};

// Rows that were asked for, and the buffer that they are read into. Destroying it gives the buffer back and never
// waits: a read that has not begun is cancelled, one in flight ends unseen. Move-only; an empty one holds nothing. For
// the thread of its prefetcher, which outlives it.
class RowRequest {
 public:
  RowRequest() = default;
  RowRequest(RowRequest&& other) noexcept;
  RowRequest& operator=(RowRequest&& other) noexcept;
  ~RowRequest();

  explicit operator bool() const { return prefetcher_ != nullptr; }
  // Blocks until the rows are there; returns the nanoseconds spent here. Rethrows what the reading threw
  // (PackageError), each time.
  uint64_t wait();
  // float32 [layers, width, row_dim]; filled when wait() has returned.
  float* rows() const;

 private:
  friend class Prefetcher;
  RowRequest(Prefetcher& prefetcher, size_t buffer) : prefetcher_(&prefetcher), buffer_(buffer) {}

  Prefetcher* prefetcher_ = nullptr;
  size_t buffer_ = 0;
};

// Brings the memory rows of tokens from a source into float32 buffers on one I/O thread of its own (with more beside it
// where a token has many parts and each of them waits), so that neither storage nor checksums nor widening cost the
// compute thread anything. That thread never preempts another one. Requests are served in their order; one that the I/O
// thread has not even begun when its rows are needed is read by wait() itself: on busy cores that is sooner than a
// wake-up. All calls come from one thread. After the construction nothing is allocated.
class Prefetcher {
 public:
  // For requests of up to `max_tokens` tokens, of which up to `buffers` are held at a time. Without `asynchronous`
  // there is no thread and wait() reads. Throws std::bad_alloc.
  Prefetcher(std::shared_ptr<const RowSource> source, size_t max_tokens, size_t buffers, bool asynchronous);
  // Waits for the read in flight. (In a forked child there is none: it returns at once.)
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // Requests the rows of the tokens from sequence[first] on, of which there is at least one; up to history() tokens
  // before them are looked at. Rows of `width` tokens are filled, at most max_tokens: the last token's are repeated.
  // Every distinct part is read once, in the order of the file. Takes the free buffer of the lowest number, and returns
  // at once unless the only free ones are still read into for a request that was dropped. Throws std::logic_error if
  // the caller holds all buffers.
  RowRequest request(std::span<const int32_t> sequence, size_t first, size_t width);

  size_t buffers() const { return buffers_.size(); }
  // Where the rows of requests that hold this buffer are.
  float* rows(size_t buffer) const { return buffers_[buffer].rows.as<float>(); }

  RowCounters counters() const;

 private:
  friend class RowRequest;

  enum class State { free, queued, running, dropped, done };  // dropped: running, but nobody wants it any more
  struct Buffer {
    Mapping rows;
    Mapping scratch;  // for one part a reader
    std::vector<RowKey> keys;
    std::vector<std::pair<uint64_t, size_t>> order;  // (index, position in keys), sorted
    std::vector<size_t> distinct;                    // where in `order` another index begins
    size_t width = 0;
    bool advised = false;  // when it was requested
    State state = State::free;
    uint64_t ticket = 0;  // of its request: they count up
    std::exception_ptr error;
  };

  static constexpr size_t kMaxReaders = 16;

  size_t free_buffer();
  uint64_t wait(Buffer& buffer);
  void give_back(Buffer& buffer);
  bool is_forked() const;
  void serve();
  Buffer* oldest_queued();
  void perform(Buffer& buffer, std::unique_lock<std::mutex>& lock);
  void fill(Buffer& buffer, RowCounters& read);
  size_t scratch_stride() const;

  const std::shared_ptr<const RowSource> source_;
  const bool asynchronous_;
  const pid_t process_;
  const std::unique_ptr<Readers> readers_;  // null: one after the other
  struct Sync {
    std::mutex mutex;
    std::condition_variable work;
    std::condition_variable ready;
  };

  // What a buffer holds belongs to the caller's thread while it is free, and to whoever set its state to running, until
  // that is over; everything else below is guarded by the mutex.
  std::vector<Buffer> buffers_;
  std::unique_ptr<Sync> sync_ = std::make_unique<Sync>();
  RowCounters counters_;
  uint64_t tickets_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace meki
