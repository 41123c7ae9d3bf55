#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace meki {
namespace {

void require(bool valid, const char* name, double got, const char* expected) {
  if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(got) + ", expected " + expected);
}

void require_finite(double best) {
  if (std::isinf(best)) throw std::runtime_error("the model computed no finite logit");
}

// The id of the greatest logit, the least of equal ones. A vocabulary is large enough for this to be felt: maxima of 16
// lanes first, then the place.
int32_t most_probable(std::span<const float> logits) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, logits.front());
  size_t id = 0;
  for (; id + kLanes <= logits.size(); id += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = std::max(lanes[lane], logits[id + lane]);
  }
  float best = *std::max_element(lanes, lanes + kLanes);
  for (; id < logits.size(); ++id) best = std::max(best, logits[id]);
  require_finite(best);
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, size_t vocab_size)
    : options_(options), random_(options.seed), candidates_(vocab_size), penalised_(vocab_size) {
  const auto& o = options_;
  require(std::isfinite(o.temperature) && o.temperature >= 0, "temperature", o.temperature, "a number >= 0");
  require(o.top_p > 0 && o.top_p <= 1, "top_p", o.top_p, "a number above 0 and at most 1");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "a number from 0 to 1");
  require(std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0, "repetition_penalty", o.repetition_penalty,
          "a number above 0");
}

bool has_nan(std::span<const float> logits) {
  unsigned found = 0;  // without an early end the loop is a vector one
  for (const float logit : logits) found |= static_cast<unsigned>(logit != logit);
  return found != 0;
}

// Fills candidates_ with the penalised logits.
void Sampler::load(std::span<const float> logits, std::span<const int32_t> sequence) {
  for (size_t id = 0; id < candidates_.size(); ++id) candidates_[id] = {logits[id], static_cast<int32_t>(id)};
  if (options_.repetition_penalty == 1.0) return;
  std::fill(penalised_.begin(), penalised_.end(), false);
  for (const int32_t id : sequence) {
    const auto index = static_cast<size_t>(id);
    if (penalised_[index]) continue;  // once, however often the token occurs
    penalised_[index] = true;
    double& logit = candidates_[index].weight;
    logit = logit > 0 ? logit / options_.repetition_penalty : logit * options_.repetition_penalty;
  }
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> sequence) {
  if (logits.size() != candidates_.size()) throw std::invalid_argument("logits do not have the size of the vocabulary");
  if (has_nan(logits)) {
    const auto nan = std::find_if(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); });
    throw std::runtime_error("the model computed NaN for token " + std::to_string(nan - logits.begin()));
  }
  if (options_.temperature == 0 && options_.repetition_penalty == 1.0) return most_probable(logits);
  load(logits, sequence);
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  };
  const Candidate best = *std::min_element(candidates_.begin(), candidates_.end(), before);
  require_finite(best.weight);
  if (options_.temperature == 0) return best.id;

  auto end = candidates_.end();
  if (options_.top_k > 0 && options_.top_k < candidates_.size()) {
    end = candidates_.begin() + options_.top_k;
    std::nth_element(candidates_.begin(), end - 1, candidates_.end(), before);
  }
  double sum = 0;
  for (auto at = candidates_.begin(); at != end; ++at) {
    at->weight = std::exp((at->weight - best.weight) / options_.temperature);
    sum += at->weight;
  }
  // The most probable come first, one by one, until top-p or min-p ends the row: cheaper than sorting a whole
  // vocabulary.
  const auto after = [&before](const Candidate& a, const Candidate& b) { return before(b, a); };
  // (After top-k they have no order of their own: the same here puts them into one.)
  const bool all = end == candidates_.end() && options_.top_p == 1 && options_.min_p == 0;
  if (all) return draw(candidates_, sum);
  std::make_heap(candidates_.begin(), end, after);
  auto heap_end = end;
  double kept_sum = 0;
  while (heap_end != candidates_.begin()) {
    const double weight = candidates_.front().weight;
    if (kept_sum > 0 && weight < options_.min_p) break;
    std::pop_heap(candidates_.begin(), heap_end, after);
    --heap_end;
    kept_sum += weight;
    if (options_.top_p < 1 && kept_sum >= options_.top_p * sum) break;
  }
  return draw({heap_end, end}, kept_sum);
}

// One of `kept` with a probability in proportion to its weight; the weights sum to `sum`.
int32_t Sampler::draw(std::span<const Candidate> kept, double sum) {
  // 53 random bits: std::uniform_real_distribution differs between standard libraries.
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * sum;
  for (const Candidate& candidate : kept) {
    left -= candidate.weight;
    if (left < 0) return candidate.id;
  }
  return std::max_element(kept.begin(), kept.end(),
                          [](const Candidate& a, const Candidate& b) { return a.weight < b.weight; })
      ->id;  // rounding left a little over
}

}  // namespace meki
