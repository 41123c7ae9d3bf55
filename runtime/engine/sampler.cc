#include "runtime/engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "runtime/base/nan.h"
#include "runtime/engine/lanes.h"

namespace meki {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void require(bool valid, const char* name, double got, const char* expected) {
  if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(got) + ", expected " + expected);
}

constexpr float kBucketWidth = 0.05F;  // logarithms of weights that differ by more are of different buckets

constexpr size_t kEverything = std::numeric_limits<size_t>::max();

}  // namespace

void SamplingOptions::check(size_t vocab_size) const {
  require(std::isfinite(temperature) && temperature >= 0, "temperature", temperature, "a number >= 0");
  require(top_p >= 0 && top_p <= 1, "top_p", top_p, "a number from 0 to 1");
  require(min_p >= 0 && min_p <= 1, "min_p", min_p, "a number from 0 to 1");
  require(std::isfinite(repetition_penalty) && repetition_penalty > 0, "repetition_penalty", repetition_penalty,
          "a number above 0");
  for (const auto& [name, value] :
       {std::pair("presence_penalty", presence_penalty), std::pair("frequency_penalty", frequency_penalty)}) {
    require(value >= -2 && value <= 2, name, value, "a number from -2 to 2");
  }
  for (const auto& [id, bias] : logit_bias) {
    if (id < 0 || static_cast<size_t>(id) >= vocab_size) {
      throw std::invalid_argument("logit_bias has token id " + std::to_string(id) + ", expected 0 to " +
                                  std::to_string(vocab_size - 1));
    }
    require(bias >= -100 && bias <= 100, ("logit_bias of token " + std::to_string(id)).c_str(), bias,
            "a number from -100 to 100");
  }
  require(logprobs.value_or(0) <= kMostLogprobs, "logprobs", logprobs.value_or(0), "a number from 0 to 20");
}

Sampler::Sampler(const SamplingOptions& options, size_t vocab_size)
    : options_(options),
      temperature_(std::max(static_cast<float>(options.temperature), 1e-30F)),  // 0 / 0 is no weight
      random_(options.seed),
      adjusted_(vocab_size),
      seen_(vocab_size),
      block_best_((vocab_size + kBlock - 1) / kBlock),
      ranked_(block_best_.size()) {
  options.check(vocab_size);
  candidates_.reserve(vocab_size);
  edge_.reserve(vocab_size);
  if (options.presence_penalty != 0 || options.frequency_penalty != 0) {
    counts_.resize(vocab_size);
    generated_.reserve(vocab_size);
  }
  if (options.logprobs) logprobs_.emplace().top.reserve(*options.logprobs + 1);
}

bool Sampler::adjusts() const {
  return options_.repetition_penalty != 1.0 || !generated_.empty() || !options_.logit_bias.empty();
}

// Changes adjusted_.
void Sampler::adjust(std::span<const int32_t> sequence) {
  if (options_.repetition_penalty != 1.0) penalise(sequence);
  for (const int32_t id : generated_) {
    const auto index = static_cast<size_t>(id);
    adjusted_[index] -= static_cast<float>(options_.presence_penalty + options_.frequency_penalty * counts_[index]);
  }
  for (const auto& [id, bias] : options_.logit_bias) adjusted_[static_cast<size_t>(id)] += static_cast<float>(bias);
}

// Changes adjusted_.
void Sampler::penalise(std::span<const int32_t> sequence) {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  std::fill(seen_.begin(), seen_.end(), false);
  for (const int32_t id : sequence) {
    const auto index = static_cast<size_t>(id);
    if (seen_[index]) continue;  // once, however often the token occurs
    seen_[index] = true;
    float& logit = adjusted_[index];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

// Changes adjusted_.
void Sampler::forbid_all_but(TokenSet allowed) {
  constexpr size_t kBits = 32;
  const size_t vocab_size = adjusted_.size();
  const size_t words = (vocab_size + kBits - 1) / kBits;
  if (allowed.size() < words) {
    throw std::invalid_argument("the set of allowed tokens has " + std::to_string(allowed.size()) + " words, " +
                                std::to_string(vocab_size) + " tokens take " + std::to_string(words));
  }
  bool any = false;
  for (size_t word = 0; word < words; ++word) {
    const size_t first = word * kBits;
    const size_t count = std::min(kBits, vocab_size - first);
    const uint32_t all = ~uint32_t{0} >> (kBits - count);
    const uint32_t bits = allowed[word] & all;
    any |= bits != 0;
    if (bits == all) continue;
    float* const logits = adjusted_.data() + first;
    for (size_t bit = 0; bit < count; ++bit) logits[bit] = (bits >> bit & 1U) != 0 ? logits[bit] : -kInfinity;
  }
  if (!any) throw std::invalid_argument("the set of allowed tokens is empty");
}

std::span<const float> Sampler::block(size_t number) const {
  return logits_.subspan(number * kBlock, std::min(kBlock, logits_.size() - number * kBlock));
}

// Fills block_best_ and best_.
void Sampler::survey() {
  bool nan = false;
  for (size_t number = 0; number < block_best_.size(); ++number) {
    const std::span<const float> values = block(number);
    nan |= has_nan(values);
    float lanes[kLanes];
    std::fill_n(lanes, kLanes, values.front());
    fold(values, lanes, [](float best, float value) { return std::max(best, value); });
    block_best_[number] = *std::max_element(lanes, lanes + kLanes);
  }
  if (nan) {
    const auto found = std::find_if(logits_.begin(), logits_.end(), [](float logit) { return std::isnan(logit); });
    throw std::runtime_error("the model computed NaN for token " + std::to_string(found - logits_.begin()));
  }
  best_ = *std::max_element(block_best_.begin(), block_best_.end());
  if (std::isinf(best_)) throw std::runtime_error("the model computed no finite logit");
}

// The token of the greatest logit, the first of equal ones.
int32_t Sampler::most_probable() const {
  const auto number = std::find(block_best_.begin(), block_best_.end(), best_) - block_best_.begin();
  const auto from = logits_.begin() + number * static_cast<std::ptrdiff_t>(kBlock);
  return static_cast<int32_t>(std::find(from, logits_.end(), best_) - logits_.begin());
}

// Weights of 0 to 1 fall into buckets, 32 an octave, the greatest first: the leading bits of a float, which order as
// the floats do. The last bucket has all that is less than 2^-63.
size_t Sampler::bucket_of(float weight) {
  constexpr int kDropped = 23 - 5;
  constexpr auto kFirst = std::bit_cast<uint32_t>(1.0F) >> kDropped;
  return std::min<size_t>(kFirst - (std::bit_cast<uint32_t>(weight) >> kDropped), kBuckets - 1);
}

// Fills candidates_, in the order of their ids, with at least as many tokens, or all that are possible: those that are
// as probable as the best one of the block that is the `blocks`th by its best one, and whoever shares a bucket with one
// of them.
void Sampler::gather(size_t blocks) {
  float least = -kInfinity;
  if (blocks <= block_best_.size()) {
    std::copy(block_best_.begin(), block_best_.end(), ranked_.begin());
    const auto nth = ranked_.begin() + static_cast<std::ptrdiff_t>(blocks - 1);
    std::nth_element(ranked_.begin(), nth, ranked_.end(), std::greater<>());
    least = exponent(*nth);
  }
  const size_t bucket = bucket_of(std::exp(least));
  const float reach = bucket < kBuckets - 1 ? least - kBucketWidth : -kInfinity;
  candidates_.clear();
  for (size_t number = 0; number < block_best_.size(); ++number) {
    if (exponent(block_best_[number]) < reach || block_best_[number] == -kInfinity) continue;
    const std::span<const float> values = block(number);
    for (size_t i = 0; i < values.size(); ++i) {
      const float power = exponent(values[i]);
      if (power < reach || power == -kInfinity) continue;
      const float weight = std::exp(power);
      if (bucket_of(weight) <= bucket) candidates_.push_back({weight, static_cast<int32_t>(number * kBlock + i)});
    }
  }
}

// Of the candidates' weights, or of their number, in each bucket.
Sampler::Totals Sampler::bucket_totals(bool by_count) const {
  Totals totals{};
  for (const Candidate& candidate : candidates_) totals[bucket_of(candidate.weight)] += measure(candidate, by_count);
  return totals;
}

// Leaves of the candidates the fewest most probable that reach the target together, at least one. Those whose bucket
// has no end of the row in it come in the order of their ids, then those of the last bucket in the order of their
// weights. The target is somewhere from `low` to `high`: false if it matters where, or if all are too few.
bool Sampler::keep(const Totals& totals, double low, double high, bool by_count) {
  double kept = 0;
  size_t last = 0;
  while (last + 1 < kBuckets && kept + totals[last] < low) kept += totals[last++];
  edge_.clear();
  size_t above = 0;
  for (const Candidate& candidate : candidates_) {
    const size_t bucket = bucket_of(candidate.weight);
    if (bucket < last) candidates_[above++] = candidate;
    if (bucket == last) edge_.push_back(candidate);
  }
  candidates_.resize(above);
  std::sort(edge_.begin(), edge_.end(), more_probable);
  for (const Candidate& candidate : edge_) {
    if (!candidates_.empty() && kept >= low) break;
    candidates_.push_back(candidate);
    kept += measure(candidate, by_count);
  }
  return kept >= high;
}

void Sampler::keep_top_k() {
  gather(options_.top_k);
  keep(bucket_totals(true), options_.top_k, options_.top_k, true);
}

// Of all tokens. Few have most of the weight, as a rule: then the sum of all is only estimated, and what is kept is the
// same, or everything is summed up.
void Sampler::keep_top_p() {
  if (options_.top_p < 1) {
    const double target = options_.top_p * exp_sum(logits_, best_, temperature_);
    for (const size_t blocks : {block_best_.size() / 16 + 1, block_best_.size()}) {
      gather(blocks);
      if (keep(bucket_totals(false), target * (1 - kExpSumError), target * (1 + kExpSumError), false)) return;
    }
  }
  gather(kEverything);
  const Totals totals = bucket_totals(false);
  const double target = options_.top_p < 1 ? options_.top_p * std::accumulate(totals.begin(), totals.end(), 0.0)
                                           : std::numeric_limits<double>::infinity();
  keep(totals, target, target, false);
}

// Top-p of the candidates.
void Sampler::keep_top_p_of_candidates() {
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

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> sequence,
                        std::optional<TokenSet> allowed) {
  if (logits.size() != adjusted_.size()) throw std::invalid_argument("logits do not have the size of the vocabulary");
  logits_ = logits;
  if (allowed || adjusts()) {
    std::copy(logits.begin(), logits.end(), adjusted_.begin());
    logits_ = adjusted_;
    adjust(sequence);
    if (allowed) forbid_all_but(*allowed);
  }
  survey();
  const int32_t id = choose();
  if (logprobs_) log_probabilities(logits, id, *options_.logprobs, *logprobs_);
  count(id);
  return id;
}

// For the penalties of what was generated.
void Sampler::count(int32_t id) {
  if (counts_.empty()) return;
  if (counts_[static_cast<size_t>(id)]++ == 0) generated_.push_back(id);
}

int32_t Sampler::choose() {
  if (options_.temperature == 0) return most_probable();

  if (options_.top_k > 0 && options_.top_k < logits_.size()) {
    keep_top_k();
    if (options_.top_p < 1) keep_top_p_of_candidates();
  } else {
    keep_top_p();
  }
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
