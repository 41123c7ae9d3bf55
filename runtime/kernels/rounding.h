#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace meki {

// The nearest integer, ties to even, of |value| < 2^22: adding 1.5 * 2^23 leaves the integer in the last bits. For
// anything else, NaN included, some integer. Unlike std::nearbyint it is inline and vectorises everywhere.
inline int32_t round_to_int(float value) { return std::bit_cast<int32_t>(value + 12582912.0F) - 0x4B400000; }

// The largest |value|; NaN if one is infinite or NaN, so that it comes out of whatever is scaled by it.
inline float largest_magnitude(const float* values, size_t count) {
  float largest = 0;
  float poison = 0;
  for (size_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(values[i]));
    poison += values[i] * 0;
  }
  return largest + poison;
}

// What values of up to `largest` are multiplied by to become integers of up to `levels`. 0 for a magnitude whose
// inverse might overflow, and for NaN: the integers are 0 then.
inline float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

}  // namespace meki
