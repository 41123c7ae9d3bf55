#include "runtime/engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numbers>
#include <numeric>
#include <stdexcept>
#include <string>

#include "runtime/base/nan.h"

namespace meki {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void require(bool valid, const char* name, double got, const char* expected) {
  if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(got) + ", expected " + expected);
}

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

// What is wrong with a vocabulary's sum of them, relative, at most: 4e-7 of each, and the rounding of three additions.
constexpr double kTotalError = 1e-6;

constexpr float kBucketWidth = 0.05F;  // logarithms of weights that differ by more are of different buckets

constexpr size_t kEverything = std::numeric_limits<size_t>::max();

}  // namespace

Sampler::Sampler(const SamplingOptions& options, size_t vocab_size)
    : options_(options),
      temperature_(std::max(static_cast<float>(options.temperature), 1e-30F)),  // 0 / 0 is no weight
      random_(options.seed),
      adjusted_(vocab_size),
      seen_(vocab_size),
      block_best_((vocab_size + kBlock - 1) / kBlock),
      ranked_(block_best_.size()) {
  candidates_.reserve(vocab_size);
  edge_.reserve(vocab_size);
  const auto& o = options_;
  require(std::isfinite(o.temperature) && o.temperature >= 0, "temperature", o.temperature, "a number >= 0");
  require(o.top_p >= 0 && o.top_p <= 1, "top_p", o.top_p, "a number from 0 to 1");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "a number from 0 to 1");
  require(std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0, "repetition_penalty", o.repetition_penalty,
          "a number above 0");
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

// The sum of all weights, within kTotalError of it.
double Sampler::approximate_total() const {
  double total = 0;
  float weights[kBlock];
  for (size_t number = 0; number < block_best_.size(); ++number) {
    const std::span<const float> values = block(number);
    for (size_t i = 0; i < values.size(); ++i) weights[i] = std::max(exponent(values[i]), kLeastExponent);
    for (size_t i = 0; i < values.size(); ++i) weights[i] = approximate_exp(weights[i]);
    float lanes[kLanes] = {};
    fold(std::span<const float>(weights, values.size()), lanes, std::plus<>());
    total += std::accumulate(lanes, lanes + kLanes, 0.0);
  }
  return total;
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
    const double target = options_.top_p * approximate_total();
    for (const size_t blocks : {block_best_.size() / 16 + 1, block_best_.size()}) {
      gather(blocks);
      if (keep(bucket_totals(false), target * (1 - kTotalError), target * (1 + kTotalError), false)) return;
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
  const bool penalty = options_.repetition_penalty != 1.0;
  if (penalty || allowed) {
    std::copy(logits.begin(), logits.end(), adjusted_.begin());
    logits_ = adjusted_;
    if (penalty) penalise(sequence);
    if (allowed) forbid_all_but(*allowed);
  }
  survey();
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
