#include "runtime/rows/prefetcher.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

#include "runtime/base/checked.h"

namespace meki {
namespace {

uint64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count());
}

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<const Rom> rom, size_t max_tokens, bool asynchronous)
    : rom_(std::move(rom)), process_(::getpid()) {
  const RomHeader& header = rom_->header();
  // The header's limits keep the first product below 2^39.
  const auto slot_bytes = checked_mul(sizeof(float) * header.layers * header.row_dim, max_tokens);
  if (!slot_bytes) throw std::bad_alloc();
  for (Slot& slot : slots_) {
    slot.rows = Mapping::zeroed(*slot_bytes);
    slot.scratch = Mapping::zeroed(rom_->scratch_bytes());
    slot.ids.reserve(max_tokens);
    slot.order.reserve(max_tokens);
  }
  if (asynchronous) thread_ = std::thread([this] { serve(); });
}

Prefetcher::~Prefetcher() {
  if (!thread_.joinable()) return;
  if (::getpid() != process_) {  // after a fork: the thread stayed with the parent, asleep on what it waits for
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

void Prefetcher::begin(int slot_index, std::span<const int32_t> ids) {
  Slot& slot = slots_[static_cast<size_t>(slot_index)];
  {
    std::unique_lock lock(sync_->mutex);
    sync_->ready.wait(lock, [&slot] { return slot.state != State::running; });
    slot.error = nullptr;
    slot.ids.assign(ids.begin(), ids.end());
    slot.state = State::queued;
    if (slots_[static_cast<size_t>(1 - slot_index)].state != State::queued) next_ = slot_index;
  }
  if (!thread_.joinable()) return;
  // Storage starts now, even if no core has time for the I/O thread.
  if (ids.size() == 1) rom_->advise(static_cast<uint32_t>(ids.front()));
  sync_->work.notify_one();
}

uint64_t Prefetcher::wait(int slot_index) {
  const auto start = std::chrono::steady_clock::now();
  Slot& slot = slots_[static_cast<size_t>(slot_index)];
  std::unique_lock lock(sync_->mutex);
  if (slot.state == State::queued) perform(slot, lock);
  sync_->ready.wait(lock, [&slot] { return slot.state == State::done; });
  slot.state = State::idle;
  if (slot.error) std::rethrow_exception(std::exchange(slot.error, nullptr));
  return nanoseconds_since(start);
}

RomCounters Prefetcher::counters() const {
  const std::lock_guard lock(sync_->mutex);
  return counters_;
}

void Prefetcher::serve() {
  // A thread of this class takes a core that is free, or its turn, but never interrupts a compute thread by waking up.
  const sched_param none{};
  ::pthread_setschedparam(::pthread_self(), SCHED_BATCH, &none);
  std::unique_lock lock(sync_->mutex);
  const auto is_queued = [this](int slot) { return slots_[static_cast<size_t>(slot)].state == State::queued; };
  for (;;) {
    sync_->work.wait(lock, [&] { return stop_ || is_queued(0) || is_queued(1); });
    if (stop_) return;
    if (!is_queued(next_)) next_ = 1 - next_;
    perform(slots_[static_cast<size_t>(next_)], lock);
    sync_->ready.notify_one();
  }
}

// Fills a queued slot without holding the lock, then marks it done.
void Prefetcher::perform(Slot& slot, std::unique_lock<std::mutex>& lock) {
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
  auto& order = slot.order;
  order.clear();
  for (size_t position = 0; position < count; ++position) order.emplace_back(slot.ids[position], position);
  std::sort(order.begin(), order.end());

  const auto is_repeat = [&order](size_t index) { return index > 0 && order[index].first == order[index - 1].first; };
  if (count > 1) {  // let storage work on all of them at once
    for (size_t index = 0; index < count; ++index) {
      if (!is_repeat(index)) rom_->advise(static_cast<uint32_t>(order[index].first));
    }
  }
  for (size_t index = 0; index < count; ++index) {
    const auto [id, position] = order[index];
    float* target = rows + position * dim;
    if (is_repeat(index)) {
      const float* source = rows + order[index - 1].second * dim;
      for (size_t layer = 0; layer < rom_->header().layers; ++layer) {
        std::memcpy(target + layer * layer_stride, source + layer * layer_stride, dim * sizeof(float));
      }
      continue;
    }
    const auto token = static_cast<uint32_t>(id);
    const auto bundle = rom_->read(token, {slot.scratch.data(), slot.scratch.size()});
    rom_->widen(bundle, target, layer_stride);
    ++read.requests;
    read.bytes += rom_->request_bytes(token);
  }
}

}  // namespace meki
