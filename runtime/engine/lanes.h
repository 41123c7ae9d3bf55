#pragma once

#include <cstddef>
#include <span>

namespace meki {

// A vocabulary is large enough for loops over it to be felt. Neighbouring tokens are looked at, or passed over, a block
// at a time, in lanes that a compiler makes vectors of.
constexpr size_t kBlock = 64;
constexpr size_t kLanes = 16;
static_assert(kBlock % kLanes == 0);

// Folds the values of a block into lanes: lane = step(lane, value).
template <class Step>
void fold(std::span<const float> block, float (&lanes)[kLanes], Step step) {
  size_t i = 0;
  for (; i + kLanes <= block.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = step(lanes[lane], block[i + lane]);
  }
  for (size_t lane = 0; i < block.size(); ++i, ++lane) lanes[lane] = step(lanes[lane], block[i]);
}

}  // namespace meki
