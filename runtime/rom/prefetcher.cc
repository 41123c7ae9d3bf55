#include "rom/prefetcher.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace meki {
namespace {

uint64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count());
}

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<const Rom> rom, size_t max_tokens, bool asynchronous)
    : rom_(std::move(rom)), asynchronous_(asynchronous), scratch_(Mapping::zeroed(rom_->scratch_bytes())) {
  const RomHeader& header = rom_->header();
  for (Slot& slot : slots_) {
    slot.rows = Mapping::zeroed(sizeof(float) * header.layers * max_tokens * header.row_dim);
    slot.ids.reserve(max_tokens);
  }
  order_.reserve(max_tokens);
  if (asynchronous_) thread_ = std::thread([this] { serve(); });
}

Prefetcher::~Prefetcher() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

void Prefetcher::begin(int slot_index, std::span<const int32_t> ids) {
  Slot& slot = slots_[static_cast<size_t>(slot_index)];
  {
    std::unique_lock lock(mutex_);
    if (asynchronous_) ready_.wait(lock, [&] { return slot.state == State::idle || slot.state == State::done; });
    slot.error = nullptr;
    slot.ids.assign(ids.begin(), ids.end());
    slot.state = State::queued;
    if (!asynchronous_) return;
    queue_[queued_++] = slot_index;
  }
  work_.notify_one();
}

uint64_t Prefetcher::wait(int slot_index) {
  const auto start = std::chrono::steady_clock::now();
  Slot& slot = slots_[static_cast<size_t>(slot_index)];
  std::unique_lock lock(mutex_);
  if (asynchronous_) {
    ready_.wait(lock, [&] { return slot.state == State::done; });
  } else {
    finish(slot, lock);
  }
  slot.state = State::idle;
  if (slot.error) std::rethrow_exception(std::exchange(slot.error, nullptr));
  return nanoseconds_since(start);
}

RomCounters Prefetcher::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

void Prefetcher::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stop_ || queued_ > 0; });
    if (stop_) return;
    Slot& slot = slots_[static_cast<size_t>(queue_[0])];
    std::shift_left(queue_.begin(), queue_.end(), 1);
    --queued_;
    finish(slot, lock);
    ready_.notify_one();
  }
}

// Fills the slot without holding the lock, then marks it done.
void Prefetcher::finish(Slot& slot, std::unique_lock<std::mutex>& lock) {
  slot.state = State::running;
  lock.unlock();
  RomCounters read;
  std::exception_ptr error;
  try {
    fill(slot, read);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  slot.error = error;
  slot.state = State::done;
  counters_.requests += read.requests;
  counters_.bytes += read.bytes;
}

void Prefetcher::fill(Slot& slot, RomCounters& read) {
  const size_t count = slot.ids.size();
  const size_t dim = rom_->header().row_dim;
  const size_t layer_stride = count * dim;
  float* rows = slot.rows.as<float>();
  order_.clear();
  for (size_t position = 0; position < count; ++position) order_.emplace_back(slot.ids[position], position);
  std::sort(order_.begin(), order_.end());

  const auto is_repeat = [this](size_t index) { return index > 0 && order_[index].first == order_[index - 1].first; };
  if (count > 1) {  // let storage work on all of them at once
    for (size_t index = 0; index < count; ++index) {
      if (!is_repeat(index)) rom_->advise(static_cast<uint32_t>(order_[index].first));
    }
  }
  for (size_t index = 0; index < count; ++index) {
    const auto [id, position] = order_[index];
    float* target = rows + position * dim;
    if (is_repeat(index)) {
      const float* source = rows + order_[index - 1].second * dim;
      for (size_t layer = 0; layer < rom_->header().layers; ++layer) {
        std::memcpy(target + layer * layer_stride, source + layer * layer_stride, dim * sizeof(float));
      }
      continue;
    }
    const auto token = static_cast<uint32_t>(id);
    const auto bundle = rom_->read(token, {scratch_.data(), scratch_.size()});
    rom_->widen(bundle, target, layer_stride);
    ++read.requests;
    read.bytes += rom_->request_bytes(token);
  }
}

}  // namespace meki
