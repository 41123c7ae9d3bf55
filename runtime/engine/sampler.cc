#include "runtime/engine/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "runtime/base/nan.h"

namespace meki {
namespace {

void require(bool valid, const char* name, double got, const char* expected) {
  if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(got) + ", expected " + expected);
}

void require_finite(double best) {
  if (std::isinf(best)) throw std::runtime_error("the model computed no finite logit");
}

// A vocabulary is large enough for this to be felt: maxima of 16 lanes, which a compiler makes vectors of.
float greatest(std::span<const float> values) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, values.front());
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = std::max(lanes[lane], values[i + lane]);
  }
  float best = *std::max_element(lanes, lanes + kLanes);
  for (; i < values.size(); ++i) best = std::max(best, values[i]);
  return best;
}

// The id of the greatest logit, the least of equal ones.
int32_t most_probable(std::span<const float> logits) {
  const float best = greatest(logits);
  require_finite(best);
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

// Weights of 0 to 1 fall into buckets, 32 an octave, the greatest first: the leading bits of a float, which order as
// the floats do. The last bucket has all that is less than 2^-63.
constexpr size_t kBuckets = 64 * 32;
constexpr double kAll = std::numeric_limits<double>::infinity();
size_t bucket_of(float weight) {
  constexpr int kDropped = 23 - 5;
  constexpr auto kFirst = std::bit_cast<uint32_t>(1.0F) >> kDropped;
  return std::min<size_t>(kFirst - (std::bit_cast<uint32_t>(weight) >> kDropped), kBuckets - 1);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, size_t vocab_size)
    : options_(options), vocab_size_(vocab_size), random_(options.seed) {
  const auto& o = options_;
  require(std::isfinite(o.temperature) && o.temperature >= 0, "temperature", o.temperature, "a number >= 0");
  require(o.top_p >= 0 && o.top_p <= 1, "top_p", o.top_p, "a number from 0 to 1");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "a number from 0 to 1");
  require(std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0, "repetition_penalty", o.repetition_penalty,
          "a number above 0");
  if (takes_most_probable()) return;
  weights_.resize(vocab_size);
  penalised_.resize(vocab_size);
  candidates_.reserve(vocab_size);
}

// Fills weights_ with e^((logit - greatest) / temperature) of the penalised logits; with temperature 0, the logits.
void Sampler::weigh(std::span<const float> logits, std::span<const int32_t> sequence) {
  std::copy(logits.begin(), logits.end(), weights_.begin());
  if (options_.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    std::fill(penalised_.begin(), penalised_.end(), false);
    for (const int32_t id : sequence) {
      const auto index = static_cast<size_t>(id);
      if (penalised_[index]) continue;  // once, however often the token occurs
      penalised_[index] = true;
      float& logit = weights_[index];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  }
  if (options_.temperature == 0) return;
  const float best = greatest(weights_);
  require_finite(best);
  const float temperature = std::max(static_cast<float>(options_.temperature), 1e-30F);  // 0 / 0 is no weight
  for (float& weight : weights_) weight = std::exp((weight - best) / temperature);
}

// Fills candidates_ with the fewest most probable tokens that top-k, or top-p of all, asks for. Those whose bucket has
// no end of the row in it come in the order of their ids, then those of the last bucket in the order of their weights.
void Sampler::keep_most_probable(bool by_count) {
  const auto measure = [by_count](float weight) { return by_count ? 1.0 : static_cast<double>(weight); };
  std::array<double, kBuckets> totals{};
  for (const float weight : weights_) totals[bucket_of(weight)] += measure(weight);
  double target = kAll;
  if (by_count) {
    target = options_.top_k;
  } else if (options_.top_p < 1) {
    target = options_.top_p * std::accumulate(totals.begin(), totals.end(), 0.0);
  }
  double kept = 0;
  size_t last = 0;
  while (last + 1 < kBuckets && kept + totals[last] < target) kept += totals[last++];

  candidates_.clear();
  for (size_t id = 0; id < weights_.size(); ++id) {
    if (bucket_of(weights_[id]) < last) candidates_.push_back({weights_[id], static_cast<int32_t>(id)});
  }
  const auto first = static_cast<std::ptrdiff_t>(candidates_.size());
  for (size_t id = 0; id < weights_.size(); ++id) {
    if (bucket_of(weights_[id]) == last) candidates_.push_back({weights_[id], static_cast<int32_t>(id)});
  }
  std::sort(candidates_.begin() + first, candidates_.end(), more_probable);
  auto end = candidates_.begin() + first;
  for (; end != candidates_.end() && (end == candidates_.begin() || kept < target); ++end) kept += measure(end->weight);
  candidates_.erase(end, candidates_.end());
}

// Top-p of the candidates.
void Sampler::keep_top_p() {
  std::sort(candidates_.begin(), candidates_.end(), more_probable);
  double target = 0;
  for (const Candidate& candidate : candidates_) target += options_.top_p * candidate.weight;
  auto end = candidates_.begin();
  double kept = 0;
  do {
    kept += (end++)->weight;
  } while (end != candidates_.end() && kept < target);
  candidates_.erase(end, candidates_.end());
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> sequence) {
  if (logits.size() != vocab_size_) throw std::invalid_argument("logits do not have the size of the vocabulary");
  if (has_nan(logits)) {
    const auto nan = std::find_if(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); });
    throw std::runtime_error("the model computed NaN for token " + std::to_string(nan - logits.begin()));
  }
  if (takes_most_probable()) return most_probable(logits);
  weigh(logits, sequence);
  if (options_.temperature == 0) return most_probable(weights_);

  const bool limited = options_.top_k > 0 && options_.top_k < weights_.size();
  keep_most_probable(limited);
  if (limited && options_.top_p < 1) keep_top_p();
  if (options_.min_p > 0) {
    std::erase_if(candidates_, [this](const Candidate& candidate) { return candidate.weight < options_.min_p; });
  }
  return draw();
}

// One of the candidates with a probability in proportion to its weight.
int32_t Sampler::draw() {
  double left = 0;
  for (const Candidate& candidate : candidates_) left += candidate.weight;
  // 53 random bits: std::uniform_real_distribution differs between standard libraries.
  left *= static_cast<double>(random_() >> 11) * 0x1p-53;
  for (const Candidate& candidate : candidates_) {
    left -= candidate.weight;
    if (left < 0) return candidate.id;
  }
  return std::min_element(candidates_.begin(), candidates_.end(), more_probable)->id;  // rounding left a little over
}

}  // namespace meki
