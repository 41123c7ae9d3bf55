#include "runtime/engine/logprobs.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numbers>
#include <numeric>
#include <stdexcept>

#include "runtime/base/nan.h"
#include "runtime/engine/lanes.h"

namespace meki {
namespace {

// e^x for x from kLeastExponent to 0, nearly: a power of two, and a series for what is left of x.
constexpr float kLeastExponent = -86.0F;
float approximate_exp(float x) {
  constexpr float kNoFraction = 0x1.8p23F;  // a sum with it has no bits for a fraction
  constexpr float kLn2 = 0.693359375F;      // in so few bits that its multiples are exact
  constexpr auto kLn2Rest = static_cast<float>(std::numbers::ln2 - double{kLn2});
  const float shifted = x * std::numbers::log2e_v<float> + kNoFraction;
  const float power = shifted - kNoFraction;
  const float rest = (x - power * kLn2) - power * kLn2Rest;
  const float end = 1.0F / 6 + rest * (1.0F / 24 + rest * (1.0F / 120 + rest * (1.0F / 720)));
  const float series = 1 + rest * (1 + rest * (0.5F + rest * end));
  return series * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + std::bit_cast<uint32_t>(1.0F));
}

float greatest(std::span<const float> logits) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, logits.front());
  fold(logits, lanes, [](float best, float value) { return std::max(best, value); });
  return *std::max_element(lanes, lanes + kLanes);
}

// Logits of the `count` greatest.
void keep_top(std::span<const float> logits, size_t count, std::vector<std::pair<int32_t, double>>& top) {
  top.clear();
  if (count == 0) return;
  for (size_t id = 0; id < logits.size(); ++id) {
    const double logit = logits[id];
    if (top.size() == count) {
      if (logit <= top.back().second) continue;  // as nearly all are
      top.pop_back();
    }
    const auto behind = [](double value, const auto& entry) { return value > entry.second; };
    top.emplace(std::upper_bound(top.begin(), top.end(), logit, behind), static_cast<int32_t>(id), logit);
  }
}

}  // namespace

double exp_sum(std::span<const float> logits, float best, float temperature) {
  double total = 0;
  float weights[kBlock];
  for (size_t first = 0; first < logits.size(); first += kBlock) {
    const std::span<const float> values = logits.subspan(first, std::min(kBlock, logits.size() - first));
    for (size_t i = 0; i < values.size(); ++i) {
      weights[i] = std::max((values[i] - best) / temperature, kLeastExponent);
    }
    for (size_t i = 0; i < values.size(); ++i) weights[i] = approximate_exp(weights[i]);
    float lanes[kLanes] = {};
    fold(std::span<const float>(weights, values.size()), lanes, std::plus<>());
    total += std::accumulate(lanes, lanes + kLanes, 0.0);
  }
  return total;
}

void log_probabilities(std::span<const float> logits, int32_t chosen, size_t top, Logprobs& out) {
  const float best = greatest(logits);
  if (has_nan(logits) || std::isinf(best)) {
    throw std::runtime_error("the model computed logits that have no probabilities: NaN, or infinite ones");
  }
  const double normalizer = double{best} + std::log(exp_sum(logits, best, 1));
  out.chosen = double{logits[static_cast<size_t>(chosen)]} - normalizer;
  keep_top(logits, top, out.top);
  for (auto& [id, value] : out.top) value -= normalizer;
}

}  // namespace meki
