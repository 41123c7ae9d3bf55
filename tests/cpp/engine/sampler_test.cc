// runtime/engine/sampler, against a naive distribution in double precision.

#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>

#include "tests/cpp/allocations.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_logits(size_t vocab_size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> logits(vocab_size);
  for (float& logit : logits) logit = static_cast<float>(random() % 100'000) / 12'500.0F - 4.0F;  // -4 .. 4
  return logits;
}

void renormalise(std::vector<std::pair<double, int32_t>>& kept) {
  double sum = 0;
  for (const auto& [probability, id] : kept) sum += probability;
  for (auto& [probability, id] : kept) probability /= sum;
}

// Every step as the header words it, each over a sorted list of (probability, id).
std::map<int32_t, double> distribution(const SamplingOptions& options, std::vector<float> logits,
                                       std::span<const int32_t> sequence) {
  std::vector<double> penalised(logits.begin(), logits.end());
  for (const int32_t id : std::set<int32_t>(sequence.begin(), sequence.end())) {
    double& logit = penalised[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / options.repetition_penalty : logit * options.repetition_penalty;
  }
  std::vector<std::pair<double, int32_t>> kept;
  for (size_t id = 0; id < penalised.size(); ++id) kept.emplace_back(penalised[id], static_cast<int32_t>(id));
  std::stable_sort(kept.begin(), kept.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  if (options.temperature == 0) return {{kept.front().second, 1.0}};

  const double best = kept.front().first;
  for (auto& [value, id] : kept) value = std::exp((value - best) / options.temperature);
  if (options.top_k > 0 && options.top_k < kept.size()) kept.resize(options.top_k);
  renormalise(kept);
  if (options.top_p < 1) {
    size_t count = 0;
    for (double sum = 0; count < kept.size() && sum < options.top_p; ++count) sum += kept[count].first;
    kept.resize(count);
  }
  const double least = options.min_p * kept.front().first;
  std::erase_if(kept, [least](const auto& entry) { return entry.first < least; });
  renormalise(kept);
  std::map<int32_t, double> out;
  for (const auto& [probability, id] : kept) out[id] = probability;
  return out;
}

// How far a count of `draws` trials of probability p may be from its mean: Bernstein's inequality for a chance of 1e-9,
// so that the few thousand comparisons here would all hold for about any seed.
double largest_deviation(double p, double draws) {
  const double log_chance = std::log(2 / 1e-9);
  const double variance = draws * p * (1 - p);
  return log_chance / 3 + std::sqrt(log_chance * log_chance / 9 + 2 * variance * log_chance);
}

void check_draws(const SamplingOptions& options, const std::vector<float>& logits, const std::vector<int32_t>& sequence,
                 int draws) {
  const std::map<int32_t, double> expected = distribution(options, logits, sequence);
  Sampler sampler(options, logits.size());
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) ++counts[sampler.sample(logits, sequence)];
  for (const auto& drawn : counts) {
    const int32_t id = drawn.first;
    CAPTURE(id);
    CHECK(expected.contains(id));
  }
  for (const auto& candidate : expected) {
    const int32_t id = candidate.first;
    const double probability = candidate.second;
    CAPTURE(id);
    const double mean = probability * draws;
    const double deviation = largest_deviation(probability, draws);
    CHECK(std::abs(counts[id] - mean) <= deviation);
    if (mean > deviation) CHECK(counts[id] > 0);  // the support is the whole of the expected one
  }
}

TEST_CASE("sampler: frequencies and support equal the naive distribution") {
  const std::vector<float> logits = random_logits(12, 1);
  const std::vector<int32_t> sequence = {3, 3, 3, 0, 7, 11, 7};
  for (const double temperature : {0.0, 0.5, 1.0, 2.5}) {
    for (const uint32_t top_k : {0U, 1U, 3U, 12U, 100U}) {
      for (const double top_p : {1.0, 0.9, 0.3, 1e-9}) {
        for (const double min_p : {0.0, 0.05, 0.5, 1.0}) {
          for (const double penalty : {1.0, 1.4, 0.6}) {
            CAPTURE(temperature);
            CAPTURE(top_k);
            CAPTURE(top_p);
            CAPTURE(min_p);
            CAPTURE(penalty);
            check_draws({.temperature = temperature,
                         .top_k = top_k,
                         .top_p = top_p,
                         .min_p = min_p,
                         .repetition_penalty = penalty,
                         .seed = 42},
                        logits, sequence, 1000);
          }
        }
      }
    }
  }
}

TEST_CASE("sampler: the long run, with enough draws to tell near probabilities apart") {
  check_draws({.temperature = 1.3, .top_p = 1.0, .seed = 7}, random_logits(8, 3), {}, 200'000);
  check_draws({.temperature = 0.9, .top_k = 6, .top_p = 0.95, .min_p = 0.01, .seed = 8}, random_logits(8, 4), {},
              200'000);
}

TEST_CASE("sampler: a large vocabulary keeps exactly the reference's tokens") {
  const std::vector<float> logits = random_logits(5000, 5);
  check_draws({.temperature = 1.0, .top_k = 40, .top_p = 0.8, .seed = 1}, logits, {}, 3000);
  check_draws({.temperature = 0.3, .top_p = 0.5, .seed = 2}, logits, {}, 1000);
  check_draws({.temperature = 1.0, .top_p = 1.0, .min_p = 0.9, .seed = 3}, logits, {}, 1000);
}

TEST_CASE("sampler: few tokens with most of the weight, among any number of others") {
  // About 64, in which neighbours are looked at together, and far above.
  for (const size_t vocab_size : {63, 64, 65, 127, 2000, 40'000}) {
    CAPTURE(vocab_size);
    std::vector<float> logits = random_logits(vocab_size, 10);
    for (const size_t likely : {size_t{3}, vocab_size / 2, vocab_size / 2 + 1, vocab_size - 1}) logits[likely] += 12;
    for (const double top_p : {0.2, 0.9, 0.999}) {
      check_draws({.temperature = 0.8, .top_p = top_p, .seed = 4}, logits, {}, 1000);
    }
    check_draws({.temperature = 0.8, .top_k = 4, .top_p = 1, .seed = 5}, logits, {}, 1000);
  }
}

TEST_CASE("sampler: a target between two tokens, however near to one") {
  // 300 equal tokens: 150 of them have half of the weight, which a little more or less of top-p makes 151 or 150.
  const std::vector<float> logits(300, 1.5F);
  const auto greatest = [&logits](double top_p) {
    Sampler sampler({.temperature = 1, .top_p = top_p, .seed = 6}, logits.size());
    int32_t id = 0;
    for (int i = 0; i < 6000; ++i) id = std::max(id, sampler.sample(logits, {}));
    return id;
  };
  CHECK(greatest(0.5 - 1e-9) == 149);
  CHECK(greatest(0.5) == 149);
  CHECK(greatest(0.5 + 1e-9) == 150);
  CHECK(greatest(1 - 1e-9) == 299);
}

TEST_CASE("sampler: equal logits are ordered by token id") {
  const std::vector<float> logits = {0, 2, 1, 2, 2, 2, 1};
  const auto support = [&logits](const SamplingOptions& options) {
    Sampler sampler(options, logits.size());
    std::set<int32_t> ids;
    for (int i = 0; i < 400; ++i) ids.insert(sampler.sample(logits, {}));
    return ids;
  };
  using Ids = std::set<int32_t>;
  CHECK(support({.temperature = 0}) == Ids{1});
  CHECK(support({.temperature = 1, .top_k = 1, .top_p = 1}) == Ids{1});
  CHECK(support({.temperature = 1, .top_k = 3, .top_p = 1}) == Ids{1, 3, 4});
  CHECK(support({.temperature = 1, .top_k = 5, .top_p = 1}) == Ids{1, 2, 3, 4, 5});
  CHECK(support({.temperature = 1, .top_k = 6, .top_p = 1}) == Ids{1, 2, 3, 4, 5, 6});
  // Of four equal tokens, two have exactly half of the probability: enough, and not one more.
  CHECK(support({.temperature = 1, .top_k = 4, .top_p = 0.5}) == Ids{1, 3});
  CHECK(support({.temperature = 1, .top_p = 0}) == Ids{1});
  CHECK(support({.temperature = 1, .top_k = 4, .top_p = 0}) == Ids{1});
  CHECK(support({.temperature = 1, .top_k = 4, .top_p = 0.75}) == Ids{1, 3, 4});
  // As probable as the most probable one is not less probable than it.
  CHECK(support({.temperature = 1, .top_p = 1, .min_p = 1}) == Ids{1, 3, 4, 5});
}

TEST_CASE("sampler: a token that is impossible is never drawn, whatever the options") {
  const std::vector<float> logits = {-kInfinity, 0.5F, -kInfinity, 0.25F, -kInfinity};
  for (const double penalty : {1.0, 2.0}) {
    Sampler sampler({.temperature = 100, .top_p = 1, .repetition_penalty = penalty}, logits.size());
    const std::vector<int32_t> sequence = {0, 1, 2};
    for (int i = 0; i < 2000; ++i) CHECK(sampler.sample(logits, sequence) % 2 == 1);
  }
  // At this temperature all but the best underflow to nothing.
  Sampler cold({.temperature = 1e-300, .top_p = 1}, logits.size());
  for (int i = 0; i < 100; ++i) CHECK(cold.sample(logits, {}) == 1);
}

TEST_CASE("sampler: the seed decides, and nothing else") {
  const std::vector<float> logits = random_logits(100, 6);
  const auto ids = [&logits](uint64_t seed) {
    Sampler sampler({.temperature = 2, .top_p = 1, .seed = seed}, logits.size());
    std::vector<int32_t> out(100);
    for (int32_t& id : out) id = sampler.sample(logits, {});
    return out;
  };
  CHECK(ids(0) == ids(0));
  CHECK(ids(std::numeric_limits<uint64_t>::max()) == ids(std::numeric_limits<uint64_t>::max()));
  CHECK(ids(0) != ids(1));
  CHECK(ids(1) != ids(1ULL << 32 | 1));  // all 64 bits count
}

TEST_CASE("sampler: logits without a choice in them are an error, and the sampler goes on") {
  for (const double temperature : {0.0, 1.0}) {
    const SamplingOptions options{.temperature = temperature, .repetition_penalty = 1.1};
    Sampler sampler(options, 4);
    const std::vector<int32_t> sequence = {0, 2};
    for (size_t position = 0; position < 4; ++position) {
      std::vector<float> logits = {3, 2, 1, 0};
      logits[position] = kNaN;
      const std::string message = error_of<std::runtime_error>([&] { sampler.sample(logits, sequence); });
      check_names(message, "token " + std::to_string(position));
    }
    const std::vector<float> impossible(4, -kInfinity);
    CHECK_THROWS_AS(sampler.sample(impossible, sequence), std::runtime_error);
    const std::vector<float> certain = {-kInfinity, -kInfinity, -kInfinity, -1e30F};
    CHECK(sampler.sample(certain, sequence) == 3);
  }
}

TEST_CASE("sampler: few tokens that are possible, fewer than a top-k, or in one block of many") {
  std::vector<float> logits(2000, -kInfinity);
  const std::vector<float> some = random_logits(9, 13);
  for (size_t i = 0; i < some.size(); ++i) logits[900 + i * i] = some[i];
  for (const double top_p : {1.0, 0.8}) {
    check_draws({.temperature = 1.5, .top_p = top_p, .seed = 1}, logits, {}, 2000);
    check_draws({.temperature = 1.5, .top_k = 50, .top_p = top_p, .seed = 2}, logits, {}, 2000);
    check_draws({.temperature = 1.5, .top_k = 3, .top_p = top_p, .min_p = 0.1, .seed = 3}, logits, {}, 2000);
  }
}

TEST_CASE("sampler: allowed tokens are drawn as if the others' logits were -infinity") {
  for (const size_t vocab_size : {1, 31, 32, 33, 64, 65, 1000}) {
    for (const uint32_t one_of : {1U, 2U, 50U}) {
      CAPTURE(vocab_size);
      CAPTURE(one_of);
      const std::vector<float> logits = random_logits(vocab_size, 11);
      std::vector<float> masked(vocab_size, -kInfinity);
      std::vector<uint32_t> allowed((vocab_size + 31) / 32);
      std::mt19937 random(one_of);
      for (size_t id = 0; id < vocab_size; ++id) {
        if (random() % one_of != 0 && id != vocab_size / 2) continue;
        masked[id] = logits[id];
        allowed[id / 32] |= 1U << id % 32;
      }
      if (vocab_size % 32 != 0) allowed.back() |= ~uint32_t{0} << vocab_size % 32;  // tokens that there are not
      const std::vector<int32_t> sequence = {0, static_cast<int32_t>(vocab_size / 2)};
      for (const SamplingOptions& options : {SamplingOptions{.temperature = 0},
                                             {.temperature = 0, .repetition_penalty = 1.5},
                                             {.temperature = 1.5, .seed = 3},
                                             {.temperature = 1, .top_p = 1, .repetition_penalty = 0.7, .seed = 4},
                                             {.temperature = 2, .top_k = 5, .top_p = 0.9, .min_p = 0.1, .seed = 5}}) {
        Sampler sampler(options, vocab_size);
        Sampler naive(options, vocab_size);
        for (int i = 0; i < 50; ++i) CHECK(sampler.sample(logits, sequence, allowed) == naive.sample(masked, sequence));
        CHECK(sampler.sample(logits, sequence) == naive.sample(logits, sequence));  // of this call alone
      }
    }
  }
}

TEST_CASE("sampler: a set of allowed tokens that leaves no choice is an error, and the sampler goes on") {
  Sampler sampler({.temperature = 0}, 40);
  const std::vector<float> logits = random_logits(40, 12);
  const auto error = [&](const std::vector<uint32_t>& allowed) {
    return error_of<std::invalid_argument>([&] { sampler.sample(logits, {}, allowed); });
  };
  check_names(error({1}), "1 words, 40 tokens take 2");
  check_names(error({}), "0 words");
  check_names(error({0, 0}), "empty");
  check_names(error({0, 0xFFFFFF00}), "empty");  // but for tokens that there are not
  std::vector<float> impossible = logits;
  impossible[33] = -kInfinity;
  const std::vector<uint32_t> allowed = {0, 2};
  CHECK_THROWS_AS(sampler.sample(impossible, {}, allowed), std::runtime_error);
  CHECK(sampler.sample(logits, {}, allowed) == 33);
  const std::vector<uint32_t> longer = {0, 2, 7};
  CHECK(sampler.sample(logits, {}, longer) == 33);
}

// What the penalties and the bias make of logits, in float as the sampler does: additions in another order would round
// otherwise, and a draw may fall between.
std::vector<float> adjusted(std::vector<float> logits, const SamplingOptions& options,
                            const std::vector<int32_t>& sequence, const std::vector<int32_t>& generated) {
  const auto repetition = static_cast<float>(options.repetition_penalty);
  for (size_t id = 0; id < logits.size(); ++id) {
    const auto is_it = [id](int32_t other) { return static_cast<size_t>(other) == id; };
    float& logit = logits[id];
    if (std::any_of(sequence.begin(), sequence.end(), is_it))
      logit = logit > 0 ? logit / repetition : logit * repetition;
    const auto count = static_cast<double>(std::count_if(generated.begin(), generated.end(), is_it));
    if (count > 0) logit -= static_cast<float>(options.presence_penalty + options.frequency_penalty * count);
    for (const auto& [biased, bias] : options.logit_bias) {
      if (is_it(biased)) logit += static_cast<float>(bias);
    }
  }
  return logits;
}

TEST_CASE("sampler: presence and frequency penalties of what is generated, and a bias") {
  for (const double presence : {0.0, 1.5, -0.5}) {
    for (const double frequency : {0.0, 0.7, -0.2}) {
      for (const double repetition : {1.0, 1.4}) {
        for (const bool biased : {false, true}) {
          for (const double temperature : {0.0, 1.2}) {
            CAPTURE(presence);
            CAPTURE(frequency);
            CAPTURE(repetition);
            CAPTURE(temperature);
            SamplingOptions options{.temperature = temperature,
                                    .repetition_penalty = repetition,
                                    .presence_penalty = presence,
                                    .frequency_penalty = frequency,
                                    .seed = 5};
            if (biased) options.logit_bias = {{7, 2.5}, {2, -100.0}, {69, 1.0}};
            Sampler sampler(options, 70);
            Sampler plain({.temperature = temperature, .seed = 5}, 70);
            const std::vector<int32_t> prompt = {2, 3, 3, 64};
            std::vector<int32_t> sequence = prompt;
            std::vector<int32_t> generated;
            for (uint32_t step = 0; step < 60; ++step) {
              const std::vector<float> logits = random_logits(70, step % 3);
              const int32_t id = sampler.sample(logits, sequence);
              CHECK(id == plain.sample(adjusted(logits, options, sequence, generated), {}));
              if (biased) CHECK(id != 2);
              sequence.push_back(id);
              generated.push_back(id);
            }
            CHECK(std::set<int32_t>(generated.begin(), generated.end()).size() < generated.size());  // some repeat
          }
        }
      }
    }
  }
}

TEST_CASE("sampler: a call that fails counts no token") {
  const std::vector<float> logits = {1.0F, 0.5F};
  const std::vector<uint32_t> none = {0};
  Sampler sampler({.temperature = 0, .presence_penalty = 2}, 2);
  CHECK_THROWS_AS(sampler.sample(logits, {}, none), std::invalid_argument);
  CHECK(sampler.sample(logits, {}) == 0);
  CHECK(sampler.sample(logits, {}) == 1);
}

TEST_CASE("sampler: options outside their range are refused by name") {
  const double nan = kNaN;
  const double infinity = kInfinity;
  for (const double wrong : {-1.0, -1e-9, infinity, nan}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.temperature = wrong}, 4); }), "temperature");
  }
  for (const double wrong : {-1e-9, -0.5, 1.0001, infinity, nan}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.top_p = wrong}, 4); }), "top_p");
  }
  for (const double wrong : {-0.1, 1.1, infinity, nan}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.min_p = wrong}, 4); }), "min_p");
  }
  for (const double wrong : {0.0, -1.0, infinity, nan}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.repetition_penalty = wrong}, 4); }),
                "repetition_penalty");
  }
  for (const double wrong : {-2.1, 2.1, infinity, nan}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.presence_penalty = wrong}, 4); }), "presence_penalty");
    check_names(error_of<std::invalid_argument>([&] { Sampler({.frequency_penalty = wrong}, 4); }),
                "frequency_penalty");
  }
  for (const double wrong : {-100.1, 101.0, infinity, nan}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.logit_bias = {{3, wrong}}}, 4); }),
                "logit_bias of token 3");
  }
  for (const int32_t wrong : {-1, 4}) {
    check_names(error_of<std::invalid_argument>([&] { Sampler({.logit_bias = {{wrong, 1.0}}}, 4); }),
                "token id " + std::to_string(wrong) + ", expected 0 to 3");
  }
  check_names(error_of<std::invalid_argument>([&] { Sampler({.logprobs = 21}, 4); }), "logprobs");
}

TEST_CASE("sampler: sample() does not allocate" * doctest::skip(!test::kCountsAllocations)) {
  const std::vector<float> logits = random_logits(1000, 9);
  const std::vector<int32_t> sequence = {1, 2, 3, 999};
  const std::vector<uint32_t> allowed(32, 0x55555555);
  const SamplingOptions variants[] = {
      {.temperature = 0},
      {.temperature = 1, .top_p = 1},
      {.temperature = 1, .top_k = 50, .top_p = 0.9, .min_p = 0.01, .repetition_penalty = 1.2},
      {.temperature = 1, .presence_penalty = 1, .frequency_penalty = 0.1, .logit_bias = {{4, 1.0}}},
  };
  for (const SamplingOptions& options : variants) {
    Sampler sampler(options, logits.size());
    const uint64_t before = test::allocations();
    for (int i = 0; i < 20; ++i) sampler.sample(logits, sequence);
    for (int i = 0; i < 20; ++i) sampler.sample(logits, sequence, allowed);
    const uint64_t made = test::allocations() - before;
    CHECK(made == 0);
  }
  CHECK(test::allocations() > 0);  // the counter counts
}

}  // namespace
}  // namespace meki
