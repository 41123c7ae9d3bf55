#include "runtime/rows/delayed_rows.h"

#include <thread>

namespace meki {

FetchedPart DelayedRows::fetch(uint64_t index, std::span<std::byte> scratch) const {
  std::this_thread::sleep_for(delay_);
  return RowDecorator::fetch(index, scratch);
}

}  // namespace meki
