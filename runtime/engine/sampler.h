#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "runtime/engine/logprobs.h"

namespace meki {

// A set of token ids, a bit each: bit i % 32 of word i / 32 is token i. uint32 [(vocab_size + 31) / 32], or more; bits
// behind the vocabulary mean nothing.
using TokenSet = std::span<const uint32_t>;

// How the next token is chosen. Applied in this order, as in Hugging Face transformers: repetition penalty, presence
// and frequency penalty, logit bias, temperature, top-k, top-p, min-p.
struct SamplingOptions {
  double temperature = 0.8;         // 0: the most probable token
  uint32_t top_k = 0;               // keep the k most probable tokens; 0: all
  double top_p = 0.95;              // keep the fewest most probable tokens that sum to at least this; 0: one, 1: all
  double min_p = 0.0;               // drop tokens less probable than this times the most probable one's; 0: none
  double repetition_penalty = 1.0;  // divides positive, multiplies negative logits of tokens in the sequence; 1: off
  double presence_penalty = 0.0;    // subtracted from logits of tokens that the generation has, -2 to 2; 0: off
  double frequency_penalty = 0.0;   // the same, times how often it has them
  std::vector<std::pair<int32_t, double>> logit_bias{};  // token ids, and what is added to their logits, -100 to 100
  std::optional<uint32_t> logprobs{};  // tell log-probabilities, and of how many most probable tokens; null: none
  uint64_t seed = 0;

  // Throws std::invalid_argument for an option outside its range, or a token id outside the vocabulary.
  void check(size_t vocab_size) const;
};

// Chooses the token ids of one generation; the same seed and logits give the same ids on every platform with IEEE 754
// arithmetic and the same exp(). Equal logits are ordered by token id. Not thread-safe.
class Sampler {
 public:
  // Throws std::invalid_argument as SamplingOptions::check.
  Sampler(const SamplingOptions& options, size_t vocab_size);

  // One token id. logits: float32 [vocab_size], left as they are; sequence: the ids so far (each below
  // vocab_size), for the repetition penalty; allowed: the tokens to choose from, the others being as if their logits
  // were -infinity. A penalty leaves -infinity as it is, so which of the two comes first makes no difference.
  // Throws std::runtime_error if a logit to choose from (with SamplingOptions::logprobs, any) is NaN or all of them are
  // -infinity, std::invalid_argument for a set that is too short or has no token. Does not allocate.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> sequence,
                 std::optional<TokenSet> allowed = std::nullopt);

  // Of the last sample(), by the logits as they were given: before penalties, bias and temperature, and of all tokens.
  // Null without SamplingOptions::logprobs.
  const std::optional<Logprobs>& logprobs() const { return logprobs_; }

 private:
  struct Candidate {
    float weight;  // probability relative to the most probable token's
    int32_t id;
  };
  static bool more_probable(const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  }

  static double measure(const Candidate& candidate, bool by_count) { return by_count ? 1.0 : candidate.weight; }

  static constexpr size_t kBuckets = 64 * 32;  // that weights fall into
  using Totals = std::array<double, kBuckets>;
  static size_t bucket_of(float weight);

  bool adjusts() const;
  void adjust(std::span<const int32_t> sequence);
  void penalise(std::span<const int32_t> sequence);
  void count(int32_t id);
  int32_t choose();
  void forbid_all_but(TokenSet allowed);
  std::span<const float> block(size_t number) const;
  void survey();
  int32_t most_probable() const;
  float exponent(float logit) const { return (logit - best_) / temperature_; }  // a weight's logarithm
  void gather(size_t blocks);
  Totals bucket_totals(bool by_count) const;
  bool keep(const Totals& totals, double low, double high, bool by_count);
  void keep_top_k();
  void keep_top_p();
  void keep_top_p_of_candidates();
  int32_t draw();

  SamplingOptions options_;
  float temperature_;
  std::mt19937_64 random_;
  std::span<const float> logits_;   // in use: those given, or adjusted_
  std::vector<float> adjusted_;     // [vocab_size], penalised and without tokens that are not allowed
  std::vector<bool> seen_;          // [vocab_size], in the sequence
  std::vector<uint32_t> counts_;    // [vocab_size], in the generation; empty without penalties of these
  std::vector<int32_t> generated_;  // the tokens that have a count, capacity vocab_size or none
  std::optional<Logprobs> logprobs_;
  std::vector<float> block_best_;      // the greatest logit of each block of neighbouring tokens
  std::vector<float> ranked_;          // [blocks], a copy
  float best_ = 0;                     // the greatest of all
  std::vector<Candidate> candidates_;  // capacity vocab_size
  std::vector<Candidate> edge_;        // capacity vocab_size; those of the last bucket that is kept
};

}  // namespace meki
