// runtime/kernels/injection, for every path that this CPU runs, against its formula in double precision.

#include "runtime/kernels/injection.h"

#include <limits>
#include <numbers>

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

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Inputs {
  size_t tokens;
  size_t hidden;
  size_t memory_dim;
  Fusion fusion{};
  bool normed = true;  // h
  Weight gate_proj;
  Weight out_proj;
  std::vector<float> x;
  std::vector<float> h;
  std::vector<float> norm_weight;
  std::vector<float> rows;
  std::vector<float> post_norm_weight;

  Inputs(size_t tokens_, size_t hidden_, size_t memory_dim_, WeightType type, Random& random)
      : tokens(tokens_),
        hidden(hidden_),
        memory_dim(memory_dim_),
        gate_proj(memory_dim, hidden, type, random),
        out_proj(hidden, memory_dim, type, random),
        x(random.floats(tokens * hidden, -2, 2)),
        h(random.floats(tokens * hidden, -3, 3)),
        norm_weight(random.floats(hidden, 0.01F, 0.03F)),  // gates of a few units, where the sigmoid is steep
        rows(random.floats(tokens * memory_dim, -1, 1)),
        post_norm_weight(random.floats(hidden, 0.5F, 1.5F)) {}

  InjectionArgs args(float* out) const {
    return {tokens,
            x.data(),
            h.data(),
            normed ? norm_weight.data() : nullptr,
            gate_proj.view(),
            rows.data(),
            fusion,
            out_proj.view(),
            post_norm_weight.data(),
            1e-5F,
            out};
  }
};

double inverse_rms(std::span<const double> row) {
  double squares = 0;
  for (const double value : row) squares += value * value;
  return 1 / std::sqrt(squares / static_cast<double>(row.size()) + double{1e-5F});
}

double norm_of(std::span<const double> row) {
  double squares = 0;
  for (const double value : row) squares += value * value;
  return std::sqrt(squares);
}

// gate_proj RMSNorm(h), and what float32 and the rounding to 8 bits may change of it.
Product naive_gate(const Inputs& in) {
  const double norm_error = (static_cast<double>(in.hidden) + 8) * kRounding;  // a sum of as many squares
  std::vector<double> normed(in.h.begin(), in.h.end());
  std::vector<double> errors(normed.size());
  for (size_t t = 0; t < in.tokens; ++t) {
    const std::span<double> row = std::span(normed).subspan(t * in.hidden, in.hidden);
    if (!in.normed) continue;
    const double inverse = inverse_rms(row);
    for (size_t i = 0; i < in.hidden; ++i) {
      row[i] *= inverse * in.norm_weight[i];
      errors[t * in.hidden + i] = std::fabs(row[i]) * norm_error;
    }
  }
  return naive_linear(in.gate_proj, normed, errors);
}

double activate(Fusion::Activation activation, double gate) {
  switch (activation) {
    case Fusion::Activation::sigmoid: return 1 / (1 + std::exp(-gate));
    case Fusion::Activation::silu: return gate / (1 + std::exp(-gate));
    case Fusion::Activation::gelu_tanh:
      return gate / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (gate + 0.044715 * gate * gate * gate)));
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// out = x + RMSNorm(out_proj (rows + sigmoid(gate_proj RMSNorm(h)))), or the like, and what the rounding to 8 bits may
// change of it.
Product naive_injection(const Inputs& in) {
  const double norm_error = (static_cast<double>(in.hidden) + 8) * kRounding;  // a sum of as many squares
  const Product gate = naive_gate(in);
  std::vector<double> fused;
  std::vector<double> errors;
  for (size_t i = 0; i < in.tokens * in.memory_dim; ++i) {
    const double open = activate(in.fusion.activation, gate.exact[i]);
    // The sigmoid's slope is 1/4 at most, those of the others 1.13; beside it an exponential, whose argument has some
    // roundings, and a few operations on numbers below 2 or the gate.
    const bool sigmoid = in.fusion.activation == Fusion::Activation::sigmoid;
    const double size = std::fabs(gate.exact[i]);
    const double error = sigmoid ? gate.bounds[i] / 4 + 16 * kRounding
                                 : gate.bounds[i] * 1.13 + 16 * kRounding * (1 + size) * (1 + size);
    fused.push_back(in.fusion.multiply ? in.rows[i] * open : in.rows[i] + open);
    errors.push_back(in.fusion.multiply ? std::fabs(in.rows[i]) * error : error);
  }
  Product out = naive_linear(in.out_proj, fused, errors);

  for (size_t t = 0; t < in.tokens; ++t) {
    const std::span<double> row = std::span(out.exact).subspan(t * in.hidden, in.hidden);
    const std::span<double> bounds = std::span(out.bounds).subspan(t * in.hidden, in.hidden);
    const double inverse = inverse_rms(row);
    // The root mean square is off by no more than the errors' own, relative to it.
    const double relative = norm_of(bounds) / norm_of(row);
    REQUIRE(relative < 0.5);
    const double inverse_error = relative / (1 - relative) + norm_error;
    for (size_t i = 0; i < in.hidden; ++i) {
      const double scale = inverse * in.post_norm_weight[i];
      bounds[i] = scale * (bounds[i] + (std::fabs(row[i]) + bounds[i]) * inverse_error);
      row[i] = in.x[t * in.hidden + i] + row[i] * scale;
      bounds[i] += 4 * kRounding * std::fabs(row[i]);
    }
  }
  return out;
}

TEST_CASE("inject: every path against the formula") {
  Random random(31);
  for (const WeightType type : {WeightType::int4, WeightType::int8_16, WeightType::int4_minimum}) {
    for (const auto& shape : {std::pair<size_t, size_t>{64, 32}, {96, 64}, {512, 128}}) {
      const size_t hidden = shape.first;
      const size_t memory_dim = shape.second;
      for (const size_t tokens : {1, 2, 9, 33}) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(hidden);
        CAPTURE(tokens);
        const Inputs inputs(tokens, hidden, memory_dim, type, random);
        const Product expected = naive_injection(inputs);
        for (const Simd* path : simd_paths()) {
          CAPTURE(path->name);
          for (const size_t count : {1, 4}) {
            Threads threads(count);
            std::vector<float> out(tokens * hidden + 1, kNaN);
            inject(*path, inputs.args(out.data()), threads.parallel());
            CHECK(std::isnan(out.back()));
            Errors errors;
            for (size_t i = 0; i < tokens * hidden; ++i) errors.add(out[i], expected.exact[i], expected.bounds[i]);
            CHECK(errors.worst() <= 1);
          }
        }
      }
    }
  }
}

TEST_CASE("inject: the other fusions, with and without a norm, against the formula") {
  Random random(34);
  for (const auto activation : {Fusion::Activation::sigmoid, Fusion::Activation::silu, Fusion::Activation::gelu_tanh}) {
    for (const bool multiply : {false, true}) {
      for (const bool normed : {false, true}) {
        CAPTURE(static_cast<int>(activation));
        CAPTURE(multiply);
        CAPTURE(normed);
        Inputs inputs(9, 96, 64, WeightType::int8, random);
        inputs.fusion = {activation, multiply};
        inputs.normed = normed;
        const Product expected = naive_injection(inputs);
        for (const Simd* path : simd_paths()) {
          CAPTURE(path->name);
          std::vector<float> out(size_t{9} * 96);
          inject(*path, inputs.args(out.data()), {});
          Errors errors;
          for (size_t i = 0; i < out.size(); ++i) errors.add(out[i], expected.exact[i], expected.bounds[i]);
          CHECK(errors.worst() <= 1);
        }
      }
    }
  }
}

TEST_CASE("inject: NaN in a token's rows or FFN input makes its output NaN, and no other's") {
  Random random(32);
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (int which = 0; which < 2; ++which) {
      CAPTURE(which);
      Inputs inputs(3, 64, 32, WeightType::int8, random);
      if (which == 0) inputs.rows[32 + 7] = kNaN;
      if (which == 1) inputs.h[64 + 7] = kNaN;
      std::vector<float> out(size_t{3} * 64);
      inject(*path, inputs.args(out.data()), {});
      bool as_expected = true;
      for (size_t i = 0; i < out.size(); ++i) as_expected = as_expected && std::isnan(out[i]) == (i / 64 == 1);
      CHECK(as_expected);
    }
  }
}

TEST_CASE("inject: allocates nothing after the first call" * doctest::skip(!test::kCountsAllocations)) {
  Random random(33);
  const Inputs inputs(20, 512, 128, WeightType::int4, random);
  std::vector<float> out(20 * 512);
  InjectionArgs args = inputs.args(out.data());
  Threads threads(4, true);
  inject(simd(), args, threads.parallel());
  const uint64_t before = test::allocations();
  for (const size_t tokens : {20, 1, 7}) {
    args.tokens = tokens;
    inject(simd(), args, threads.parallel());
    inject(simd(), args, {});
  }
  const uint64_t made = test::allocations() - before;
  CHECK(made == 0);
}

}  // namespace
}  // namespace meki
