#pragma once

#include <cmath>
#include <cstddef>

namespace meki {

inline float dot(const float* a, const float* b, size_t size) {
  constexpr size_t kLanes = 16;  // independent sums, which the compiler keeps in vectors
  float sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0;
  for (; i < size; ++i) sum += a[i] * b[i];
  for (const float part : sums) sum += part;
  return sum;
}

// 1 / sqrt(mean(x^2) + epsilon): what RMSNorm multiplies with.
inline float inverse_rms(const float* x, size_t size, float epsilon) {
  return 1 / std::sqrt(dot(x, x, size) / static_cast<float>(size) + epsilon);
}

}  // namespace meki
