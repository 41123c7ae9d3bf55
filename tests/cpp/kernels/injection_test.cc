// runtime/kernels/injection, for every path that this CPU runs, against its formula in double precision.

#include "runtime/kernels/injection.h"

#include <limits>

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
  size_t gate_stride;
  Weight out_proj;
  std::vector<float> x;
  std::vector<float> gate;  // memory_dim of every gate_stride
  std::vector<float> rows;
  std::vector<float> out_gain;

  Inputs(size_t tokens_, size_t hidden_, size_t memory_dim_, int bits, Random& random)
      : tokens(tokens_),
        hidden(hidden_),
        memory_dim(memory_dim_),
        gate_stride(memory_dim + 5),
        out_proj(hidden, memory_dim, bits, random),
        x(random.floats(tokens * hidden, -2, 2)),
        gate(random.floats(tokens * gate_stride, -6, 6)),
        rows(random.floats(tokens * memory_dim, -1, 1)),
        out_gain(random.floats(hidden, 0.5F, 1.5F)) {}

  InjectionStep step(float* out) const {
    return {tokens, x.data(), gate.data(), gate_stride, rows.data(), out_proj.view(), out_gain.data(), 1e-5F, out};
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

// out = x + RMSNorm(out_proj (rows + sigmoid(gate))), and what the rounding to 8 bits may change of it.
Product naive_injection(const Inputs& in) {
  const double norm_error = (static_cast<double>(in.hidden) + 8) * kRounding;  // a sum of as many squares
  std::vector<double> fused;
  std::vector<double> errors;
  for (size_t t = 0; t < in.tokens; ++t) {
    for (size_t i = 0; i < in.memory_dim; ++i) {
      const double gate = in.gate[t * in.gate_stride + i];
      fused.push_back(in.rows[t * in.memory_dim + i] + 1 / (1 + std::exp(-gate)));
      errors.push_back(16 * kRounding);  // of an exponential and three operations on numbers below 2
    }
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
      const double scale = inverse * in.out_gain[i];
      bounds[i] = scale * (bounds[i] + (std::fabs(row[i]) + bounds[i]) * inverse_error);
      row[i] = in.x[t * in.hidden + i] + row[i] * scale;
      bounds[i] += 4 * kRounding * std::fabs(row[i]);
    }
  }
  return out;
}

TEST_CASE("inject: every path against the formula") {
  Random random(31);
  for (const int bits : {4, 8}) {
    for (const auto& [hidden, memory_dim] : {std::pair<size_t, size_t>{64, 32}, {96, 64}, {512, 128}}) {
      for (const size_t tokens : {1, 2, 9, 33}) {
        CAPTURE(bits);
        CAPTURE(hidden);
        CAPTURE(tokens);
        const Inputs inputs(tokens, hidden, memory_dim, bits, random);
        const Product expected = naive_injection(inputs);
        for (const Simd* path : simd_paths()) {
          CAPTURE(path->name);
          for (const size_t count : {1, 4}) {
            Threads threads(count);
            std::vector<float> out(tokens * hidden + 1, kNaN);
            inject(*path, inputs.step(out.data()), threads.parallel());
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

TEST_CASE("inject: NaN in a token's rows or gate makes its output NaN, and no other's") {
  Random random(32);
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (int which = 0; which < 2; ++which) {
      CAPTURE(which);
      Inputs inputs(3, 64, 32, 8, random);
      if (which == 0) inputs.rows[32 + 7] = kNaN;
      if (which == 1) inputs.gate[inputs.gate_stride + 7] = kNaN;
      std::vector<float> out(size_t{3} * 64);
      inject(*path, inputs.step(out.data()), {});
      bool as_expected = true;
      for (size_t i = 0; i < out.size(); ++i) as_expected = as_expected && std::isnan(out[i]) == (i / 64 == 1);
      CHECK(as_expected);
    }
  }
}

TEST_CASE("inject: allocates nothing after the first call" * doctest::skip(!test::kCountsAllocations)) {
  Random random(33);
  const Inputs inputs(20, 512, 128, 4, random);
  std::vector<float> out(20 * 512);
  InjectionStep step = inputs.step(out.data());
  Threads threads(4, true);
  inject(simd(), step, threads.parallel());
  const uint64_t before = test::allocations();
  for (const size_t tokens : {20, 1, 7}) {
    step.tokens = tokens;
    inject(simd(), step, threads.parallel());
    inject(simd(), step, {});
  }
  const uint64_t made = test::allocations() - before;
  CHECK(made == 0);
}

}  // namespace
}  // namespace meki
