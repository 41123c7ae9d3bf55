#pragma once

#include <cmath>
#include <cstddef>

namespace meki {

// 1 / sqrt(mean(x^2) + epsilon): what RMSNorm multiplies with.
inline float inverse_rms(const float* x, size_t size, float epsilon) {
  constexpr size_t kLanes = 16;  // independent sums, which the compiler keeps in vectors
  float sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  }
  float sum = 0;
  for (; i < size; ++i) sum += x[i] * x[i];
  for (const float part : sums) sum += part;
  return 1 / std::sqrt(sum / static_cast<float>(size) + epsilon);
}

}  // namespace meki
