#pragma once

#include <span>

namespace meki {

// Whether there is a NaN in `values`.
inline bool has_nan(std::span<const float> values) {
  unsigned found = 0;  // without an early end the loop is a vector one
  for (const float value : values) found |= static_cast<unsigned>(value != value);
  return found != 0;
}

}  // namespace meki
