// runtime/kernels/experts, for every path that this CPU runs, against its formula in double precision.

#include "runtime/kernels/experts.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "tests/cpp/allocations.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::Errors;
using test::kRounding;
using test::naive_linear;
using test::Product;
using test::Random;
using test::Threads;
using test::Weight;

constexpr WeightType kTypes[] = {WeightType::int4, WeightType::int8, WeightType::int8_minimum, WeightType::float32};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A matrix of each expert, and their bytes as the kernel takes them.
struct Matrices {
  size_t outputs;
  size_t inputs;
  WeightType type;
  std::vector<Weight> packed;
  std::vector<float> floats;
  test::Bytes bytes;

  Matrices(size_t experts, size_t outputs_, size_t inputs_, WeightType type_, Random& random)
      : outputs(outputs_), inputs(inputs_), type(type_) {
    if (type == WeightType::float32) floats = random.floats(experts * outputs * inputs, -0.2F, 0.2F);
    for (size_t e = 0; e < experts && type != WeightType::float32; ++e) {
      packed.emplace_back(outputs, inputs, type, random);
      bytes.insert(bytes.end(), packed.back().packed.begin(), packed.back().packed.end());
    }
  }

  ExpertMatrices view() const {
    return {type == WeightType::float32 ? reinterpret_cast<const std::byte*>(floats.data()) : bytes.data(), outputs,
            inputs, type};
  }

  // One row times an expert's matrix; the row's elements may be off by `errors`.
  Product times(size_t expert, const std::vector<double>& row, const std::vector<double>& errors) const {
    if (type != WeightType::float32) return naive_linear(packed[expert], row, errors);
    Product product{std::vector<double>(outputs), std::vector<double>(outputs)};
    for (size_t n = 0; n < outputs; ++n) {
      double magnitude = 0;
      for (size_t i = 0; i < inputs; ++i) {
        const double weight = floats[(expert * outputs + n) * inputs + i];
        product.exact[n] += weight * row[i];
        product.bounds[n] += std::fabs(weight) * errors[i];
        magnitude += std::fabs(weight * row[i]);
      }
      product.bounds[n] += static_cast<double>(inputs + 2) * kRounding * magnitude;
    }
    return product;
  }
};

struct Inputs {
  size_t tokens;
  size_t hidden;
  size_t experts;
  size_t experts_per_token;
  bool norm_topk_prob;
  std::vector<float> x;
  std::vector<float> norm_weight;
  std::vector<float> router;
  Matrices gate_up;
  Matrices down;
  std::vector<float> residual;

  Inputs(size_t tokens_, size_t experts_, size_t experts_per_token_, WeightType type, Random& random,
         size_t hidden_ = 64, size_t width = 96)
      : tokens(tokens_),
        hidden(hidden_),
        experts(experts_),
        experts_per_token(experts_per_token_),
        norm_topk_prob(random.below(2) == 1),
        x(random.floats(tokens * hidden, -3, 3)),
        norm_weight(random.floats(hidden, 0.5F, 1.5F)),
        router(random.floats(experts * hidden, -0.4F, 0.4F)),
        gate_up(experts, 2 * width, hidden, type, random),
        down(experts, hidden, width, type, random),
        residual(random.floats(tokens * hidden, -1, 1)) {}

  ExpertsArgs args(float* out, bool add = true) const {
    return {tokens,
            x.data(),
            norm_weight.data(),
            1e-5F,
            router.data(),
            experts,
            experts_per_token,
            norm_topk_prob,
            gate_up.view(),
            down.view(),
            add ? residual.data() : nullptr,
            out};
  }
};

// The formula for one token, and what float32 and the rounding to 8 bits may change of it.
Product naive_token(const Inputs& in, size_t t, bool add) {
  std::vector<double> h(in.x.begin() + static_cast<std::ptrdiff_t>(t * in.hidden),
                        in.x.begin() + static_cast<std::ptrdiff_t>((t + 1) * in.hidden));
  double squares = 0;
  for (const double value : h) squares += value * value;
  const double inverse = 1 / std::sqrt(squares / static_cast<double>(in.hidden) + double{1e-5F});
  std::vector<double> errors(in.hidden);
  for (size_t i = 0; i < in.hidden; ++i) {
    h[i] *= inverse * in.norm_weight[i];
    errors[i] = std::fabs(h[i]) * static_cast<double>(in.hidden + 8) * kRounding;  // a sum of as many squares
  }

  std::vector<double> shares(in.experts);
  double worst = 0;  // error of a logit
  for (size_t e = 0; e < in.experts; ++e) {
    double magnitude = 0;
    for (size_t i = 0; i < in.hidden; ++i) {
      shares[e] += in.router[e * in.hidden + i] * h[i];
      magnitude += std::fabs(in.router[e * in.hidden + i] * h[i]);
    }
    worst = std::max(worst, static_cast<double>(2 * in.hidden + 16) * kRounding * magnitude);
  }
  double sum = 0;
  for (double& share : shares) sum += share = std::exp(share);
  for (double& share : shares) share /= sum;
  std::vector<size_t> order(in.experts);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](size_t a, size_t b) { return shares[a] > shares[b]; });
  const size_t count = in.experts_per_token;
  if (count < in.experts && shares[order[count - 1]] != shares[order[count]]) {
    // No rounding makes it another expert.
    REQUIRE(shares[order[count - 1]] > shares[order[count]] * (1 + 8 * worst));
  }
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += shares[order[i]];
  // An exponential of a difference, twice in a quotient; sums of as many.
  const double share_error = 4 * worst + static_cast<double>(2 * in.experts + 16) * kRounding;

  Product out{std::vector<double>(in.hidden), std::vector<double>(in.hidden)};
  for (size_t i = 0; i < count; ++i) {
    const Product both = in.gate_up.times(order[i], h, errors);
    const size_t width = in.down.inputs;
    std::vector<double> made(width);
    std::vector<double> off(width);
    for (size_t j = 0; j < width; ++j) {
      const double gate = both.exact[j];
      const double up = both.exact[width + j];
      const double silu = gate / (1 + std::exp(-gate));
      made[j] = silu * up;
      // SiLU's slope is below 1.1; an exponential and four operations.
      const double silu_error = 1.1 * both.bounds[j];
      off[j] = silu_error * (std::fabs(up) + both.bounds[width + j]) + std::fabs(silu) * both.bounds[width + j] +
               8 * kRounding * std::fabs(made[j]);
    }
    const Product given = in.down.times(order[i], made, off);
    const double share = shares[order[i]] / (in.norm_topk_prob ? total : 1);
    for (size_t j = 0; j < in.hidden; ++j) {
      out.exact[j] += share * given.exact[j];
      out.bounds[j] += share * (given.bounds[j] * (1 + share_error) + std::fabs(given.exact[j]) * share_error);
    }
  }
  for (size_t j = 0; j < in.hidden; ++j) {
    const double added = add ? double{in.residual[t * in.hidden + j]} : 0;
    out.bounds[j] += static_cast<double>(2 * count + 2) * kRounding * (std::fabs(out.exact[j]) + std::fabs(added));
    out.exact[j] += added;
  }
  return out;
}

// All paths, with and without a residual, on one thread and on four.
void check_experts(const Inputs& in) {
  CAPTURE(in.tokens);
  CAPTURE(in.experts);
  CAPTURE(in.experts_per_token);
  CAPTURE(in.norm_topk_prob);
  CAPTURE(static_cast<int>(in.down.type));
  for (const bool add : {true, false}) {
    std::vector<Product> expected;
    for (size_t t = 0; t < in.tokens; ++t) expected.push_back(naive_token(in, t, add));
    for (const Simd* path : simd_paths()) {
      CAPTURE(path->name);
      std::vector<float> first;
      for (const size_t count : {1, 4}) {
        Threads threads(count);
        std::vector<float> out(in.tokens * in.hidden + 1, kNaN);
        mix_experts(*path, in.args(out.data(), add), threads.parallel());
        CHECK(std::isnan(out.back()));
        out.pop_back();
        Errors errors;
        for (size_t i = 0; i < out.size(); ++i) {
          const Product& token = expected[i / in.hidden];
          errors.add(out[i], token.exact[i % in.hidden], token.bounds[i % in.hidden]);
        }
        CHECK(errors.worst() <= 1);
        if (first.empty()) first = out;
        CHECK(out == first);  // whatever the threads
      }
    }
  }
}

TEST_CASE("experts: every path against the formula") {
  Random random(41);
  for (const WeightType type : kTypes) {
    for (const auto& [experts, chosen] : {std::pair<size_t, size_t>{1, 1}, {3, 2}, {8, 2}, {8, 8}, {40, 1}}) {
      for (const size_t tokens : {1, 2, 9, 33}) check_experts(Inputs(tokens, experts, chosen, type, random));
    }
  }
  check_experts(Inputs(9, 3, 2, WeightType::float32, random, 37, 19));  // widths that fill no vector
}

TEST_CASE("experts: equal shares are those of the first experts, and no others' weights are read") {
  Random random(42);
  for (const WeightType type : kTypes) {
    Inputs in(5, 6, 2, type, random);
    std::ranges::fill(in.router, 0.0F);
    for (Matrices* matrices : {&in.gate_up, &in.down}) {
      const size_t read = matrices->bytes.size() / 3;
      std::ranges::fill(std::span(matrices->bytes).subspan(read), std::byte{0xFF});  // scales of NaN
      const size_t values = matrices->floats.size() / 3;
      std::ranges::fill(std::span(matrices->floats).subspan(values), kNaN);
    }
    check_experts(in);
  }
}

TEST_CASE("experts: a token of NaN makes its own output NaN, a router of NaN or infinity all") {
  Random random(43);
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (const WeightType type : kTypes) {
      CAPTURE(static_cast<int>(type));
      Inputs in(3, 5, 2, type, random);
      std::vector<float> out(in.tokens * in.hidden);
      in.x[64 + 7] = kNaN;
      mix_experts(*path, in.args(out.data()), {});
      bool as_expected = true;
      for (size_t i = 0; i < out.size(); ++i) as_expected = as_expected && std::isnan(out[i]) == (i / 64 == 1);
      CHECK(as_expected);
      for (const float wrong : {kNaN, kInfinity, -kInfinity}) {
        for (const size_t expert : {0, 4}) {  // the first is what a maximum begins with
          Inputs spoilt(3, 5, 2, type, random);
          std::fill_n(spoilt.router.begin() + static_cast<std::ptrdiff_t>(expert * 64), 64, wrong);  // inf - inf
          mix_experts(*path, spoilt.args(out.data()), {});
          CHECK(std::ranges::all_of(out, [](float value) { return std::isnan(value); }));
        }
      }
    }
  }
}

TEST_CASE("experts: allocates nothing after the first call" * doctest::skip(!test::kCountsAllocations)) {
  Random random(44);
  for (const WeightType type : {WeightType::int4, WeightType::float32}) {
    const Inputs in(20, 8, 2, type, random, 256, 128);
    std::vector<float> out(20 * 256);
    ExpertsArgs args = in.args(out.data());
    Threads threads(4, true);
    mix_experts(simd(), args, threads.parallel());
    const uint64_t before = test::allocations();
    for (const size_t tokens : {20, 1, 7}) {
      args.tokens = tokens;
      mix_experts(simd(), args, threads.parallel());
      mix_experts(simd(), args, {});
    }
    const uint64_t made = test::allocations() - before;
    CHECK(made == 0);
  }
}

}  // namespace
}  // namespace meki
