#include "runtime/rows/row_cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace meki {
namespace {

constexpr size_t kWays = 64;  // of a set at least, unless there are fewer parts: wide sets fill evenly

Mapping allocate(size_t bytes) {
  try {
    return Mapping::zeroed(bytes);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("the row cache needs " + std::to_string(bytes >> 20) +
                             " MiB, which the system does not give; choose a smaller one");
  }
}

}  // namespace

size_t RowCache::room(const RowSource& source, size_t bytes) {
  return bytes / (source.part_bytes() + sizeof(Entry) + sizeof(uint32_t));
}

RowCache::RowCache(std::shared_ptr<const RowSource> source, size_t bytes)
    : RowDecorator(std::move(source)),
      sets_(std::max<size_t>(room(*this, bytes) / kWays, 1)),
      ways_(room(*this, bytes) / sets_),
      entries_(allocate(sets_ * ways_ * sizeof(Entry))),
      slots_(allocate(sets_ * ways_ * part_bytes())),
      used_(sets_) {}

void RowCache::advise(uint64_t index) const noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (find(set_of(index), index) != nullptr) return;
  }
  RowDecorator::advise(index);
}

FetchedPart RowCache::fetch(uint64_t index, std::span<std::byte> scratch) const {
  const std::span<std::byte> copy = scratch.first(part_bytes());
  {
    const std::lock_guard lock(mutex_);
    const Set set = set_of(index);
    if (Entry* const entry = find(set, index)) {
      std::memcpy(copy.data(), slot(set, *entry), copy.size());
      std::rotate(set.entries, entry, entry + 1);
      return {copy, 0};
    }
  }
  const FetchedPart part = RowDecorator::fetch(index, scratch);
  const std::lock_guard lock(mutex_);
  const Set set = set_of(index);
  if (find(set, index) == nullptr) insert(set, index, part.stored);  // no other thread was faster
  return part;
}

// A hash that spreads runs of indices; its upper bits choose the set.
RowCache::Set RowCache::set_of(uint64_t index) const {
  const size_t set = ((index * 0x9E3779B97F4A7C15) >> 32) * sets_ >> 32;
  return {entries_.as<Entry>() + set * ways_, used_[set], slots_.data() + set * ways_ * part_bytes()};
}

RowCache::Entry* RowCache::find(const Set& set, uint64_t index) {
  Entry* const end = set.entries + set.used;
  Entry* const found = std::find_if(set.entries, end, [index](const Entry& entry) { return entry.index == index; });
  return found == end ? nullptr : found;
}

std::byte* RowCache::slot(const Set& set, const Entry& entry) const { return set.slots + entry.slot * part_bytes(); }

void RowCache::insert(const Set& set, uint64_t index, std::span<const std::byte> stored) const {
  if (set.used < ways_) {
    set.entries[set.used].slot = set.used;
    ++set.used;
  }
  Entry* const last = set.entries + set.used - 1;
  last->index = index;
  std::memcpy(slot(set, *last), stored.data(), stored.size());
  std::rotate(std::min(set.entries + ways_ * 3 / 4, last), last, last + 1);
}

void RowCache::drop_cache() const noexcept {
  {
    const std::lock_guard lock(mutex_);
    std::fill(used_.begin(), used_.end(), 0);
  }
  RowDecorator::drop_cache();
}

std::shared_ptr<const RowSource> with_row_cache(std::shared_ptr<const RowSource> source, size_t bytes) {
  if (RowCache::room(*source, bytes) == 0) return source;
  return std::make_shared<const RowCache>(std::move(source), bytes);
}

}  // namespace meki
