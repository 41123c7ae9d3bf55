#pragma once

#include <mutex>
#include <set>
#include <string>

#include "runtime/base/error.h"
#include "runtime/rows/row_decorator.h"

namespace meki::test {

// A source some of whose parts cannot be read, until they are repaired. Thread-safe.
class FaultyRows final : public RowDecorator {
 public:
  explicit FaultyRows(std::shared_ptr<const RowSource> source) : RowDecorator(std::move(source)) {}

  void damage(uint64_t index) const {
    const std::lock_guard lock(mutex_);
    damaged_.insert(index);
  }
  void repair(uint64_t index) const {
    const std::lock_guard lock(mutex_);
    damaged_.erase(index);
  }

  // Throws PackageError for a damaged part.
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override {
    {
      const std::lock_guard lock(mutex_);
      if (damaged_.contains(index)) throw PackageError("bundle " + std::to_string(index) + " is damaged");
    }
    return RowDecorator::fetch(index, scratch);
  }

 private:
  mutable std::mutex mutex_;
  mutable std::set<uint64_t> damaged_;
};

}  // namespace meki::test
