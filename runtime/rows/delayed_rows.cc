#include "runtime/rows/delayed_rows.h"

#include <thread>

namespace meki {

size_t DelayedRows::read(uint64_t index, std::span<std::byte> scratch, float* out, size_t layer_stride) const {
  std::this_thread::sleep_for(delay_);
  return RowDecorator::read(index, scratch, out, layer_stride);
}

}  // namespace meki
