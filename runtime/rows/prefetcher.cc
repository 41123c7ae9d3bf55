#include "runtime/rows/prefetcher.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>

#include "runtime/base/checked.h"

namespace meki {
namespace {

uint64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count());
}

// Copies `layers` runs of `count` floats, `stride` floats apart in both.
void copy_layers(const float* from, float* to, size_t stride, size_t layers, size_t count) {
  for (size_t layer = 0; layer < layers; ++layer) {
    std::memcpy(to + layer * stride, from + layer * stride, count * sizeof(float));
  }
}

}  // namespace

RowRequest::RowRequest(RowRequest&& other) noexcept
    : prefetcher_(std::exchange(other.prefetcher_, nullptr)), buffer_(other.buffer_) {}

RowRequest& RowRequest::operator=(RowRequest&& other) noexcept {
  RowRequest taken(std::move(other));
  std::swap(prefetcher_, taken.prefetcher_);
  std::swap(buffer_, taken.buffer_);
  return *this;
}

RowRequest::~RowRequest() {
  if (prefetcher_ != nullptr) prefetcher_->give_back(prefetcher_->buffers_[buffer_]);
}

uint64_t RowRequest::wait() { return prefetcher_->wait(prefetcher_->buffers_[buffer_]); }

float* RowRequest::rows() const { return prefetcher_->rows(buffer_); }

Prefetcher::Prefetcher(std::shared_ptr<const RowSource> source, size_t max_tokens, size_t buffers, bool asynchronous)
    : source_(std::move(source)),
      asynchronous_(asynchronous),
      process_(::getpid()),
      readers_(asynchronous && source_->waits() && source_->keys_per_token() > 1
                   ? std::make_unique<Readers>(std::min(source_->keys_per_token(), kMaxReaders))
                   : nullptr),
      buffers_(buffers) {
  const RowShape shape = source_->shape();
  auto bytes = checked_mul(sizeof(float) * shape.layers, shape.row_dim);
  if (bytes) bytes = checked_mul(*bytes, max_tokens);
  if (!bytes) throw std::bad_alloc();
  for (Buffer& buffer : buffers_) {
    buffer.rows = Mapping::zeroed(*bytes);
    buffer.scratch = Mapping::zeroed((readers_ ? readers_->count() : 1) * scratch_stride());
    buffer.keys.reserve(max_tokens * source_->keys_per_token());
    buffer.order.reserve(max_tokens * source_->keys_per_token());
    buffer.distinct.reserve(max_tokens * source_->keys_per_token());
  }
  if (asynchronous_) thread_ = std::thread([this] { serve(); });
}

Prefetcher::~Prefetcher() {
  if (!asynchronous_) return;
  if (is_forked()) {  // the thread stayed with the parent, asleep on what it waits for
    thread_.detach();
    static_cast<void>(sync_.release());
    return;
  }
  {
    const std::lock_guard lock(sync_->mutex);
    stop_ = true;
  }
  sync_->work.notify_one();
  thread_.join();
}

RowRequest Prefetcher::request(std::span<const int32_t> sequence, size_t first, size_t width) {
  const size_t number = free_buffer();
  Buffer& buffer = buffers_[number];
  const size_t keys = source_->keys_per_token();
  const size_t count = sequence.size() - first;
  buffer.width = width;
  buffer.keys.resize(count * keys);
  for (size_t token = 0; token < count; ++token) {
    source_->keys(sequence.first(first + token + 1), std::span(buffer.keys).subspan(token * keys, keys));
  }
  buffer.advised = asynchronous_ && count == 1;
  if (buffer.advised) {  // storage starts now, even if no core has time for the I/O thread
    for (const RowKey& key : buffer.keys) source_->advise(key.index);
  }
  {
    const std::lock_guard lock(sync_->mutex);
    buffer.state = State::queued;
    buffer.ticket = tickets_++;
  }
  if (asynchronous_) sync_->work.notify_one();
  return {*this, number};
}

// The lowest number of a free buffer; waits for a dropped one that is still read into.
size_t Prefetcher::free_buffer() {
  const auto find = [this](State state) {
    const auto is_in = [state](const Buffer& buffer) { return buffer.state == state; };
    return static_cast<size_t>(std::find_if(buffers_.begin(), buffers_.end(), is_in) - buffers_.begin());
  };
  std::unique_lock lock(sync_->mutex);
  sync_->ready.wait(lock, [&] { return find(State::free) < buffers() || find(State::dropped) == buffers(); });
  const size_t number = find(State::free);
  if (number < buffers()) return number;
  throw std::logic_error("all " + std::to_string(buffers()) + " buffers of rows are held; destroy a request first");
}

uint64_t Prefetcher::wait(Buffer& buffer) {
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(sync_->mutex);
  if (buffer.state == State::queued) perform(buffer, lock);
  sync_->ready.wait(lock, [&buffer] { return buffer.state == State::done; });
  if (buffer.error) std::rethrow_exception(buffer.error);
  return nanoseconds_since(start);
}

void Prefetcher::give_back(Buffer& buffer) {
  if (is_forked()) return;  // the mutex may be locked for ever
  const std::lock_guard lock(sync_->mutex);
  buffer.state = buffer.state == State::running ? State::dropped : State::free;
  buffer.error = nullptr;
}

bool Prefetcher::is_forked() const { return asynchronous_ && ::getpid() != process_; }

RowCounters Prefetcher::counters() const {
  const std::lock_guard lock(sync_->mutex);
  return counters_;
}

void Prefetcher::serve() {
  give_way_to_compute();
  std::unique_lock lock(sync_->mutex);
  for (;;) {
    Buffer* next = nullptr;
    sync_->work.wait(lock, [&] { return stop_ || (next = oldest_queued()) != nullptr; });
    if (stop_) return;
    perform(*next, lock);
    sync_->ready.notify_one();
  }
}

Prefetcher::Buffer* Prefetcher::oldest_queued() {
  Buffer* oldest = nullptr;
  for (Buffer& buffer : buffers_) {
    if (buffer.state == State::queued && (oldest == nullptr || buffer.ticket < oldest->ticket)) oldest = &buffer;
  }
  return oldest;
}

// Fills a queued buffer without holding the lock, then marks it done, or free if nobody wants it any more.
void Prefetcher::perform(Buffer& buffer, std::unique_lock<std::mutex>& lock) {
  buffer.state = State::running;
  lock.unlock();
  RowCounters read;
  std::exception_ptr error;
  try {
    fill(buffer, read);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  counters_ += read;
  const bool dropped = buffer.state == State::dropped;
  buffer.state = dropped ? State::free : State::done;
  if (!dropped) buffer.error = std::move(error);
}

size_t Prefetcher::scratch_stride() const {
  constexpr size_t kUnit = RowSource::kScratchAlignment;
  return (source_->scratch_bytes() + kUnit - 1) / kUnit * kUnit;
}

void Prefetcher::fill(Buffer& buffer, RowCounters& read) {
  const RowShape shape = source_->shape();
  const RowShape part = source_->part();
  const size_t layer_stride = buffer.width * shape.row_dim;
  const size_t keys_per_token = source_->keys_per_token();
  float* const rows = buffer.rows.as<float>();
  auto& order = buffer.order;
  order.clear();
  for (size_t i = 0; i < buffer.keys.size(); ++i) order.emplace_back(buffer.keys[i].index, i);
  std::sort(order.begin(), order.end());

  auto& distinct = buffer.distinct;
  distinct.clear();
  for (size_t i = 0; i < order.size(); ++i) {
    if (i == 0 || order[i].first != order[i - 1].first) distinct.push_back(i);
  }
  if (!buffer.advised && order.size() > 1) {  // let storage work on all of them at once
    for (const size_t i : distinct) source_->advise(order[i].first);
  }
  const auto place = [&](size_t position) {
    const RowKey& key = buffer.keys[position];
    return rows + key.layer * layer_stride + position / keys_per_token * shape.row_dim + key.column;
  };
  std::mutex counting;
  const auto read_part = [&](size_t piece, size_t reader) {
    const size_t first = distinct[piece];
    const size_t end = piece + 1 < distinct.size() ? distinct[piece + 1] : order.size();
    const auto [index, position] = order[first];
    const std::span scratch(buffer.scratch.data() + reader * scratch_stride(), source_->scratch_bytes());
    const size_t bytes = source_->read(index, scratch, place(position), layer_stride);
    for (size_t i = first + 1; i < end; ++i) {
      copy_layers(place(position), place(order[i].second), layer_stride, part.layers, part.row_dim);
    }
    const std::lock_guard lock(counting);
    read += {1, bytes == 0 ? uint64_t{1} : 0, bytes};
  };
  if (readers_) {
    readers_->run(distinct.size(), std::ref(read_part));  // a reference: nothing is allocated for it
  } else {
    for (size_t piece = 0; piece < distinct.size(); ++piece) read_part(piece, 0);
  }
  const size_t count = buffer.keys.size() / keys_per_token;
  const float* const last = rows + (count - 1) * shape.row_dim;
  for (size_t token = count; token < buffer.width; ++token) {
    copy_layers(last, rows + token * shape.row_dim, layer_stride, shape.layers, shape.row_dim);
  }
}

}  // namespace meki
