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
using test::naive_norm;
using test::naive_post_norm;
using test::Product;
using test::Random;
using test::Threads;
using test::Weight;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kEpsilon = 1e-5F;

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
  float row_scale = 1;
  std::vector<float> context{};  // of three layers, this being the middle one; empty: none
  std::vector<float> context_norm_weight{};
  float scale = 1;

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
    return {.tokens = tokens,
            .x = x.data(),
            .h = h.data(),
            .norm_weight = normed ? norm_weight.data() : nullptr,
            .gate_proj = gate_proj.view(),
            .rows = rows.data(),
            .row_scale = row_scale,
            .context = context.empty() ? nullptr : context.data() + memory_dim,
            .context_stride = 3 * memory_dim,
            .context_norm_weight = context_norm_weight.data(),
            .fusion = fusion,
            .out_proj = out_proj.view(),
            .post_norm_weight = post_norm_weight.data(),
            .epsilon = kEpsilon,
            .scale = scale,
            .out = out};
  }
};

// RMSNorm of float32 values.
Product naive_norm_of(std::span<const float> row, const std::vector<float>& weight) {
  const std::vector<double> values(row.begin(), row.end());
  return naive_norm(values, std::vector<double>(values.size()), weight, kEpsilon);
}

// gate_proj RMSNorm(h), and what float32 and the rounding to 8 bits may change of it.
Product naive_gate(const Inputs& in) {
  std::vector<double> seen(in.h.begin(), in.h.end());
  std::vector<double> errors(seen.size());
  for (size_t t = 0; in.normed && t < in.tokens; ++t) {
    const Product normed = naive_norm_of(std::span(in.h).subspan(t * in.hidden, in.hidden), in.norm_weight);
    std::ranges::copy(normed.exact, seen.begin() + static_cast<std::ptrdiff_t>(t * in.hidden));
    std::ranges::copy(normed.bounds, errors.begin() + static_cast<std::ptrdiff_t>(t * in.hidden));
  }
  return naive_linear(in.gate_proj, seen, errors);
}

// row_scale * rows + RMSNorm(context), and what float32 may change of it.
Product naive_rows(const Inputs& in) {
  Product rows{{in.rows.begin(), in.rows.end()}, std::vector<double>(in.rows.size())};
  for (size_t t = 0; t < in.tokens; ++t) {
    Product context{std::vector<double>(in.memory_dim), std::vector<double>(in.memory_dim)};
    if (!in.context.empty()) {
      const std::span<const float> its = std::span(in.context).subspan((3 * t + 1) * in.memory_dim, in.memory_dim);
      context = naive_norm_of(its, in.context_norm_weight);
    }
    for (size_t i = 0; i < in.memory_dim; ++i) {
      const size_t at = t * in.memory_dim + i;
      rows.exact[at] = double{in.row_scale} * in.rows[at] + context.exact[i];
      if (in.row_scale == 1 && in.context.empty()) continue;  // nothing is rounded
      const double sizes = std::fabs(double{in.row_scale} * in.rows[at]) + std::fabs(context.exact[i]);
      rows.bounds[at] = context.bounds[i] + 3 * kRounding * sizes;
    }
  }
  return rows;
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
  const Product gate = naive_gate(in);
  const Product rows = naive_rows(in);
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
    const double row = rows.exact[i];
    fused.push_back(in.fusion.multiply ? row * open : row + open);
    errors.push_back(in.fusion.multiply ? std::fabs(row) * error + rows.bounds[i] * (std::fabs(open) + error)
                                        : error + rows.bounds[i]);
  }
  Product out = naive_linear(in.out_proj, fused, errors);
  naive_post_norm(out, in.post_norm_weight, kEpsilon, in.x.data());
  for (size_t i = 0; in.scale != 1 && i < out.exact.size(); ++i) {
    out.exact[i] *= in.scale;
    out.bounds[i] = out.bounds[i] * std::fabs(in.scale) + 2 * kRounding * std::fabs(out.exact[i]);
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

TEST_CASE("inject: scaled rows, a norm of the context beside them and a scale behind, each alone and all") {
  Random random(35);
  for (int which = 0; which < 4; ++which) {
    for (const bool multiply : {false, true}) {
      for (const size_t tokens : {1, 9, 33}) {
        CAPTURE(which);
        CAPTURE(multiply);
        CAPTURE(tokens);
        Inputs inputs(tokens, 96, 64, WeightType::int8, random);
        inputs.fusion = {Fusion::Activation::gelu_tanh, multiply};
        inputs.normed = false;
        if (which == 0 || which == 3) inputs.row_scale = 0.70710678F;
        if (which == 1 || which == 3) {
          inputs.context = random.floats(tokens * 3 * 64, -20, 20);
          inputs.context_norm_weight = random.floats(64, 0.5F, 1.5F);
        }
        if (which == 2 || which == 3) inputs.scale = 0.0625F;
        const Product expected = naive_injection(inputs);
        for (const Simd* path : simd_paths()) {
          CAPTURE(path->name);
          for (const size_t count : {1, 4}) {
            Threads threads(count);
            std::vector<float> out(tokens * 96 + 1, kNaN);
            inject(*path, inputs.args(out.data()), threads.parallel());
            CHECK(std::isnan(out.back()));
            Errors errors;
            for (size_t i = 0; i < tokens * 96; ++i) errors.add(out[i], expected.exact[i], expected.bounds[i]);
            CHECK(errors.worst() <= 1);
          }
        }
      }
    }
  }
}

TEST_CASE("inject: NaN in a token's rows, FFN input or context makes its output NaN, and no other's") {
  Random random(32);
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (int which = 0; which < 3; ++which) {
      CAPTURE(which);
      Inputs inputs(3, 64, 32, WeightType::int8, random);
      if (which == 0) inputs.rows[32 + 7] = kNaN;
      if (which == 1) inputs.h[64 + 7] = kNaN;
      inputs.context = random.floats(size_t{3} * 3 * 32, -1, 1);
      inputs.context_norm_weight = random.floats(32, 0.5F, 1.5F);
      if (which == 2) inputs.context[(3 + 1) * 32 + 7] = kNaN;
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
