// runtime/engine/logprobs, and what the sampler tells of them, against a log-softmax in double precision.

#include "runtime/engine/logprobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

#include "runtime/engine/sampler.h"
#include "tests/cpp/allocations.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using Top = std::vector<std::pair<int32_t, double>>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// The sum's error, 1e-6, and that of differences of logits in float32: half of 2^-23 of as much as ln(vocab_size), 12,
// where tokens so far below the best one have the weight together.
constexpr double kError = 3e-6;

std::vector<float> random_logits(size_t vocab_size, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> logits(vocab_size);
  for (float& logit : logits)
    logit = (static_cast<float>(random() % 1000) / 500.0F - 1.0F) * spread;  // with equal ones
  return logits;
}

std::vector<double> naive(const std::vector<float>& logits) {
  const double best = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(logit - best);
  std::vector<double> out;
  for (const float logit : logits) out.push_back(logit - best - std::log(total));
  return out;
}

Top naive_top(const std::vector<double>& logprobs, size_t count) {
  Top all;
  for (size_t id = 0; id < logprobs.size(); ++id) all.emplace_back(static_cast<int32_t>(id), logprobs[id]);
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  all.resize(std::min(count, all.size()));
  return all;
}

void check(const Logprobs& got, const std::vector<float>& logits, int32_t chosen, size_t count) {
  const std::vector<double> expected = naive(logits);
  CHECK(std::abs(got.chosen - expected[static_cast<size_t>(chosen)]) <= kError);
  const Top top = naive_top(expected, count);
  REQUIRE(got.top.size() == top.size());
  for (size_t i = 0; i < top.size(); ++i) {
    CHECK(got.top[i].first == top[i].first);
    CHECK(std::abs(got.top[i].second - top[i].second) <= kError);
  }
}

TEST_CASE("sampler, log-probabilities: those of a naive log-softmax") {
  for (const size_t vocab_size : {1, 2, 15, 16, 64, 65, 1000, 150'000}) {
    for (const float spread : {0.0F, 0.5F, 20.0F, 500.0F}) {
      CAPTURE(vocab_size);
      CAPTURE(spread);
      std::vector<float> logits = random_logits(vocab_size, spread, 1);
      Logprobs got;
      for (const size_t count : {0, 1, 7, 20}) {
        const auto chosen = static_cast<int32_t>(vocab_size * 2 / 3);
        log_probabilities(logits, chosen, count, got);
        check(got, logits, chosen, count);
      }
      logits[vocab_size / 3] = 600;  // far above all others
      log_probabilities(logits, 0, 3, got);
      check(got, logits, 0, 3);
    }
  }
}

TEST_CASE("sampler, log-probabilities: tokens that are impossible") {
  const std::vector<float> logits = {-kInfinity, 1, -kInfinity, 2};
  Logprobs got;
  log_probabilities(logits, 1, 4, got);
  CHECK(std::abs(got.chosen - (-1 - std::log1p(std::exp(-1.0)))) <= kError);
  REQUIRE(got.top.size() == 4);
  CHECK(got.top[0].first == 3);
  CHECK(got.top[2] == std::pair<int32_t, double>(0, -kInfinity));
  CHECK(got.top[3] == std::pair<int32_t, double>(2, -kInfinity));
}

TEST_CASE("sampler, log-probabilities: logits that have none") {
  Logprobs got;
  for (const float wrong : {kNaN, kInfinity}) {
    for (const size_t position : {0, 40}) {
      std::vector<float> logits = random_logits(70, 1, 2);
      logits[position] = wrong;
      check_names(error_of<std::runtime_error>([&] { log_probabilities(logits, 1, 2, got); }), "no probabilities");
    }
  }
  const std::vector<float> impossible(3, -kInfinity);
  CHECK_THROWS_AS(log_probabilities(impossible, 1, 2, got), std::runtime_error);
}

TEST_CASE("sampler, log-probabilities: of the logits as they are, whatever the options") {
  const std::vector<float> logits = random_logits(100, 3, 3);
  const std::vector<int32_t> sequence = {4, 5, 5};
  const std::vector<uint32_t> allowed(4, 0x0F0F0F0F);
  const SamplingOptions options{.temperature = 1.5,
                                .top_k = 50,
                                .repetition_penalty = 1.3,
                                .presence_penalty = 1,
                                .frequency_penalty = 0.5,
                                .logit_bias = {{3, 5.0}},
                                .logprobs = 5,
                                .seed = 4};
  SamplingOptions silent = options;
  silent.logprobs.reset();
  Sampler sampler(options, logits.size());
  Sampler other(silent, logits.size());
  for (int i = 0; i < 50; ++i) {
    const std::optional<TokenSet> set = i % 2 == 0 ? std::nullopt : std::optional<TokenSet>(allowed);
    const int32_t id = sampler.sample(logits, sequence, set);
    CHECK(other.sample(logits, sequence, set) == id);
    REQUIRE(sampler.logprobs().has_value());
    check(*sampler.logprobs(), logits, id, 5);
    CHECK(!other.logprobs().has_value());
  }
}

TEST_CASE("sampler, log-probabilities do not allocate" * doctest::skip(!test::kCountsAllocations)) {
  const std::vector<float> logits = random_logits(1000, 3, 5);
  for (const uint32_t top : {0U, 1U, 20U}) {
    Sampler sampler({.temperature = 0.7, .logprobs = top}, logits.size());
    const uint64_t before = test::allocations();
    for (int i = 0; i < 20; ++i) sampler.sample(logits, {});
    const uint64_t made = test::allocations() - before;
    CHECK(made == 0);
  }
}

}  // namespace
}  // namespace meki
