#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "runtime/measure/sequence.h"

namespace meki::bench {

// What to measure. Counts are of tokens. Passive data.
struct Plan {
  static constexpr size_t kTurn = 4;  // decode steps that a contender measures before it is the other one's turn
  static constexpr size_t kGroup = 2 * kTurn;  // steps of each contender in one group of turns, A B B A

  std::vector<size_t> depths{};  // in the cache when decode begins; 0 is as 1: a generation needs a token to start from
  size_t prefill = 0;            // 0: none
  size_t tokens = 32;            // decode steps of each contender in one run of a test, at least 1; to compare, a
                                 // multiple of kGroup
  size_t repetitions = 5;        // rounds
  bool synthetic_depth = false;  // fill the cache instead of computing it
  bool compare = false;          // two contenders, which take turns of kTurn; if not, each of any number makes all of
                                 // its steps in a row
  bool cold = false;             // drop the contenders' rows from the page cache before every step
  size_t lead_in = 1;            // decode steps before each turn that are not measured

  // Decode steps in a row.
  size_t turn() const { return compare ? kTurn : tokens; }
  // Decode steps from one rewind to the next, measured or not.
  size_t steps() const { return tokens + (compare ? tokens / kTurn : 1) * lead_in; }
  // That the test of decode at `depth` needs.
  size_t context(size_t depth) const { return decode_context(depth, steps()); }
  // Tokens in the cache at the middle step of the test at `depth`, which is what the step reads.
  size_t mean_depth(size_t depth) const { return std::max<size_t>(depth, 1) + (steps() + 1) / 2; }
  // Pieces of work in measure(), which tells of each.
  size_t units() const { return depths.size() + (depths.size() + (prefill > 0 ? 1 : 0)) * (1 + repetitions); }
};

}  // namespace meki::bench
