#pragma once

#include <chrono>
#include <memory>
#include <utility>

#include "runtime/rows/row_decorator.h"

namespace meki {

// A source of which every read takes `delay` longer: slow storage, imitated for measurements.
class DelayedRows final : public RowDecorator {
 public:
  DelayedRows(std::shared_ptr<const RowSource> source, std::chrono::microseconds delay)
      : RowDecorator(std::move(source)), delay_(delay) {}

  bool waits() const override { return true; }
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override;

 private:
  const std::chrono::microseconds delay_;
};

}  // namespace meki
