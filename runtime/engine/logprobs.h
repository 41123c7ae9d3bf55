#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace meki {

// The sum of e^((logit - best) / temperature), within kExpSumError of it, relative. `best` is the greatest of the
// logits, of which none is NaN.
double exp_sum(std::span<const float> logits, float best, float temperature);

// 4e-7 of each, and the rounding of three additions.
constexpr double kExpSumError = 1e-6;

constexpr size_t kMostLogprobs = 20;  // that are told of a token's step, besides its own

// Natural logarithms of probabilities, all that one token was chosen from.
struct Logprobs {
  double chosen = 0;                            // of the token itself
  std::vector<std::pair<int32_t, double>> top;  // of the most probable tokens, the first ids of equal ones first
};

// Fills `out` with the log-probabilities of `logits`, the logarithm of their softmax within 3e-6: that of `chosen`, and
// the `top` greatest, or all if there are not so many. Throws std::runtime_error if a logit is NaN or the greatest is
// infinite. Does not allocate if out.top has the capacity top + 1.
void log_probabilities(std::span<const float> logits, int32_t chosen, size_t top, Logprobs& out);

}  // namespace meki
