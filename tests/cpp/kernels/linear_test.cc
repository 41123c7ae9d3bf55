// runtime/kernels/linear and the panels of every path that this CPU runs, against naive products in double precision.

#include "runtime/kernels/linear.h"

#include <algorithm>
#include <limits>
#include <numbers>

#include "tests/cpp/allocations.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::ActivationSet;
using test::code_range;
using test::Errors;
using test::kPackedTypes;
using test::kRounding;
using test::naive_linear;
using test::naive_post_norm;
using test::Product;
using test::Random;
using test::Threads;
using test::Weight;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Codes {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> excess;

  explicit Codes(size_t inputs) : codes(inputs), scales(inputs / 32), excess(inputs / 16) {}
};

TEST_CASE("quantize: half a scale, the excess of codes with an offset, and the same codes on every path") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(3);
    Errors errors;
    for (int round = 0; round < 200; ++round) {
      const size_t inputs = 32 * (1 + random.below(20));
      std::vector<float> x(inputs);
      for (size_t i = 0; i < inputs; ++i) {
        if (i % 32 == 0)
          x[i] = std::ldexp(random.uniform(-1, 1), random.between(-20, 20));
        else
          x[i] = random.uniform(-1, 1) * std::fabs(x[i / 32 * 32]) * (round % 2 == 0 ? 1.0F : 2.0F);
      }
      if (round % 10 == 0) std::fill_n(x.begin(), 32, 0.0F);
      Codes got(inputs);
      path->quantize(x.data(), inputs, got.codes.data(), got.scales.data(), got.excess.data());
      for (size_t b = 0; b < inputs / 32; ++b) {
        double largest = 0;
        int32_t sums[2] = {};
        for (size_t i = 32 * b; i < 32 * (b + 1); ++i) {
          largest = std::max(largest, std::fabs(double{x[i]}));
          sums[i / 16 % 2] += got.codes[i];
        }
        errors.add(got.scales[b], largest / 127, largest / 127 * 2 * kRounding);
        CHECK(got.excess[2 * b] == -8 * (sums[0] + sums[1]));
        CHECK(got.excess[2 * b + 1] == -8 * sums[0]);
        for (size_t i = 32 * b; i < 32 * (b + 1); ++i) {
          // Half a code; three roundings move it by up to 127 * 3 * 2^-24.
          errors.add(got.codes[i], largest > 0 ? x[i] * 127 / largest : 0, 0.5 + 127 * 4 * kRounding);
        }
      }
      Codes portable(inputs);
      simd_paths().back()->quantize(x.data(), inputs, portable.codes.data(), portable.scales.data(),
                                    portable.excess.data());
      CHECK(got.codes == portable.codes);
      CHECK(got.scales == portable.scales);
    }
    CHECK(errors.worst() <= 1);
  }
}

TEST_CASE("quantize: NaN and infinity are in the scale, codes stay in their range") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (const float wrong : {kNaN, kInfinity, -kInfinity}) {
      std::vector<float> x(96, 0.5F);
      x[32 + 11] = wrong;
      Codes got(96);
      path->quantize(x.data(), 96, got.codes.data(), got.scales.data(), got.excess.data());
      for (size_t b = 0; b < 3; ++b) {
        CHECK(std::isfinite(got.scales[b]) == (b != 1));
        int32_t sums[2] = {};
        for (size_t i = 32 * b; i < 32 * (b + 1); ++i) sums[i / 16 % 2] += got.codes[i];
        CHECK(got.excess[2 * b] == -8 * (sums[0] + sums[1]));
        CHECK(got.excess[2 * b + 1] == -8 * sums[0]);
        CHECK(std::ranges::min(got.codes) >= -127);
      }
    }
  }
}

ActivationSet random_activations(size_t tokens, size_t inputs, Random& random) {
  std::vector<int8_t> codes(tokens * inputs);
  for (int8_t& code : codes) code = static_cast<int8_t>(random.between(-127, 127));
  return {tokens, inputs, std::move(codes), random.floats(tokens * inputs / 32, 0, 0.05F)};
}

void check_panel(const Simd& path, const Weight& weight, const ActivationSet& x) {
  CAPTURE(static_cast<int>(weight.type));
  CAPTURE(weight.inputs);
  CAPTURE(x.tokens);
  constexpr size_t kStride = 19;
  std::vector<float> out(x.tokens * kStride, kNaN);
  path.panels[static_cast<size_t>(weight.type)](weight.packed.data(), x.view(), out.data(), kStride);
  const size_t blocks = weight.inputs / 32;
  Errors errors;
  for (size_t t = 0; t < x.tokens; ++t) {
    for (size_t r = 0; r < kStride; ++r) {
      const float got = out[t * kStride + r];
      if (r >= 16) {
        REQUIRE(std::isnan(got));  // not this panel's
        continue;
      }
      double exact = 0;
      double magnitude = 0;
      for (size_t b = 0; b < blocks; ++b) {
        const double scale = x.scales[t * blocks + b];
        for (size_t first = 32 * b; first < 32 * (b + 1); first += weight.group) {
          double sum = 0;
          double offset = 0;
          for (size_t i = first; i < first + weight.group; ++i) {
            const auto code = static_cast<double>(x.codes[t * x.inputs + i]);
            sum += weight.scaled(r, i) * code;
            offset += weight.offset(r, i) * code;
          }
          exact += (sum + offset) * scale;
          magnitude += (std::fabs(sum) + std::fabs(offset)) * scale;
        }
      }
      // A group's sum of integers is exact (below 2^24); what is rounded is the product with two scales, that of the
      // minimum, and the sum over groups and minimums.
      const double terms = static_cast<double>(blocks) * (32.0 / static_cast<double>(weight.group) + weight.minimum);
      errors.add(got, exact, (terms + 4) * kRounding * magnitude);
    }
  }
  CHECK(errors.worst() <= 1);
}

TEST_CASE("panels: every path against the product of what is stored") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(4);
    for (const WeightType type : kPackedTypes) {
      for (const size_t inputs : {32, 64, 96, 352, 1024}) {
        const Weight weight(16, inputs, type, random);
        for (const size_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 17, 32}) {
          check_panel(*path, weight, random_activations(tokens, inputs, random));
        }
      }
    }
  }
}

TEST_CASE("panels: the largest codes do not overflow") {
  constexpr size_t kInputs = 256;
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(5);
    for (const WeightType type : kPackedTypes) {
      // Even rows and tokens have codes of one sign, odd ones signs at random.
      const auto pick = [&](size_t row, auto low, auto high) {
        return row % 2 == 0 || random.below(2) == 0 ? low : high;
      };
      std::vector<int> codes(16 * kInputs);
      for (size_t i = 0; i < codes.size(); ++i) {
        const size_t row = i / kInputs;
        const auto [low, high] = code_range(type);
        codes[i] = row % 4 == 0 ? high : pick(row, low, high);
      }
      const Weight weight(16, kInputs, type, codes, random);
      for (const size_t tokens : {1, 4, 8, 9}) {
        std::vector<int8_t> x(tokens * kInputs);
        for (const bool negative : {false, true}) {
          for (size_t i = 0; i < x.size(); ++i) {
            x[i] = pick(i / kInputs, negative ? int8_t{-127} : int8_t{127}, negative ? int8_t{127} : int8_t{-127});
          }
          check_panel(*path, weight, {tokens, kInputs, x, std::vector<float>(tokens * kInputs / 32, 0.01F)});
        }
      }
    }
  }
}

struct Case {
  size_t tokens;
  size_t outputs;
  size_t inputs;
  WeightType type;
  LinearInput::Kind kind;
};

// All paths, with and without a norm and a residual behind the product, on one thread and on four.
void check_linear(const Case& c, Random& random) {
  CAPTURE(c.tokens);
  CAPTURE(c.outputs);
  CAPTURE(c.inputs);
  CAPTURE(static_cast<int>(c.type));
  CAPTURE(static_cast<int>(c.kind));
  const bool swiglu = c.kind == LinearInput::Kind::swiglu;
  const bool geglu = c.kind == LinearInput::Kind::geglu;
  const bool norm = c.kind == LinearInput::Kind::norm;
  const Weight weight(c.outputs, c.inputs, c.type, random);
  const size_t stride = (swiglu || geglu ? 2 : 1) * c.inputs + 5;
  const std::vector<float> x = random.floats(c.tokens * stride, -2, 2);
  const std::vector<float> norm_weight = random.floats(c.inputs, 0.5F, 1.5F);
  const std::vector<float> residual = random.floats(c.tokens * c.outputs, -1, 1);
  const std::vector<float> post_norm_weight = random.floats(c.outputs, 0.5F, 1.5F);
  const LinearInput input{c.kind, x.data(), stride, norm ? norm_weight.data() : nullptr, norm ? 1e-3F : 0};

  std::vector<double> made;
  std::vector<double> errors;
  for (size_t t = 0; t < c.tokens; ++t) {
    const std::span<const float> row = std::span(x).subspan(t * stride, stride);
    double squares = 0;
    for (const float value : row.first(c.inputs)) squares += double{value} * value;
    const double inverse = 1 / std::sqrt(squares / static_cast<double>(c.inputs) + double{1e-3F});
    for (size_t i = 0; i < c.inputs; ++i) {
      const double x3 = std::pow(double{row[i]}, 3);
      const double gelu = 0.5 * row[i] * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (row[i] + 0.044715 * x3)));
      made.push_back(norm     ? row[i] * inverse * norm_weight[i]
                     : swiglu ? row[i] / (1 + std::exp(-double{row[i]})) * row[c.inputs + i]
                     : geglu  ? gelu * row[c.inputs + i]
                              : row[i]);
      // The mean of squares sums as many terms; SwiGLU has an exponential and four operations, GeGLU also an argument
      // of up to 4 with eight roundings.
      const double roundings = norm ? static_cast<double>(c.inputs) + 8 : swiglu ? 8 : geglu ? 40 : 0;
      errors.push_back(roundings * kRounding * std::fabs(made.back()));
    }
  }
  const Product product = naive_linear(weight, made, errors);

  const float* const post_norm = post_norm_weight.data();
  for (const LinearEnd& end :
       {LinearEnd{}, LinearEnd{residual.data()}, {nullptr, post_norm, 1e-3F}, {residual.data(), post_norm, 1e-3F}}) {
    CAPTURE(end.post_norm_weight);
    CAPTURE(end.residual);
    Product expected = product;
    if (end.post_norm_weight != nullptr) {
      naive_post_norm(expected, post_norm_weight, end.epsilon, end.residual);
    } else {
      for (size_t i = 0; i < residual.size(); ++i) {
        if (end.residual != nullptr) expected.exact[i] += residual[i];
        expected.bounds[i] += 2 * kRounding * std::fabs(expected.exact[i]);
      }
    }
    for (const Simd* path : simd_paths()) {
      CAPTURE(path->name);
      std::vector<float> first;
      for (const size_t count : {1, 4}) {
        Threads threads(count);
        std::vector<float> out(c.tokens * c.outputs + 1, kNaN);
        linear(*path, weight.view(), input, end, c.tokens, out.data(), threads.parallel());
        CHECK(std::isnan(out.back()));
        out.pop_back();
        Errors off;
        for (size_t i = 0; i < out.size(); ++i) off.add(out[i], expected.exact[i], expected.bounds[i]);
        CHECK(off.worst() <= 1);
        if (first.empty()) first = out;
        CHECK(out == first);  // whatever the threads
      }
    }
  }
}

TEST_CASE("linear: every kind of input, outputs that fill no panel") {
  using Kind = LinearInput::Kind;
  Random random(6);
  for (const WeightType type : kPackedTypes) {
    for (const Kind kind : {Kind::plain, Kind::norm, Kind::swiglu, Kind::geglu}) {
      for (const size_t tokens : {1, 2, 9, 33}) {
        for (const size_t outputs : {1, 15, 16, 17, 50}) check_linear({tokens, outputs, 96, type, kind}, random);
      }
      // Several pieces of work; chunks of the input with a remainder.
      check_linear({1, 1003, 1056, type, kind}, random);
      check_linear({9, 203, 544, type, kind}, random);
    }
  }
}

TEST_CASE("linear: matrices of several types one below the other are as each alone") {
  Random random(10);
  const size_t outputs[] = {48, 7, 160, 16, 33};
  constexpr size_t kInputs = 352;
  constexpr size_t kStride = 48 + 7 + 160 + 16 + 33;
  std::vector<Weight> weights;
  std::vector<PackedWeight> views;
  weights.reserve(5);
  views.reserve(5);
  for (size_t i = 0; i < 5; ++i) weights.emplace_back(outputs[i], kInputs, kPackedTypes[i], random);
  for (const Weight& weight : weights) views.push_back(weight.view());
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (const size_t tokens : {1, 11}) {
      const std::vector<float> x = random.floats(tokens * kInputs, -1, 1);
      const std::vector<float> residual = random.floats(tokens * kStride, -1, 1);
      const LinearInput input{.x = x.data(), .stride = kInputs};
      Threads threads(3);
      std::vector<float> out(tokens * kStride, kNaN);
      linear(*path, views, input, {residual.data()}, tokens, out.data(), threads.parallel());
      size_t column = 0;
      for (const Weight& weight : weights) {
        std::vector<float> alone(tokens * weight.outputs);
        linear(*path, weight.view(), input, {}, tokens, alone.data(), {});
        bool same = true;
        for (size_t t = 0; t < tokens; ++t) {
          for (size_t n = 0; n < weight.outputs; ++n) {
            const size_t at = t * kStride + column + n;
            same = same && out[at] == alone[t * weight.outputs + n] + residual[at];
          }
        }
        CHECK(same);
        column += weight.outputs;
      }

      // A norm is one over the outputs of all.
      const std::vector<float> norm_weight = random.floats(kStride, 0.5F, 1.5F);
      linear(*path, views, input, {}, tokens, out.data(), {});
      Product expected{{out.begin(), out.end()}, std::vector<double>(out.size())};
      naive_post_norm(expected, norm_weight, 1e-3F, residual.data());
      const LinearEnd end{residual.data(), norm_weight.data(), 1e-3F};
      linear(*path, views, input, end, tokens, out.data(), threads.parallel());
      Errors errors;
      for (size_t i = 0; i < out.size(); ++i) errors.add(out[i], expected.exact[i], expected.bounds[i]);
      CHECK(errors.worst() <= 1);
    }
  }
}

TEST_CASE("linear: a NaN or infinite input makes its own token's outputs NaN") {
  Random random(7);
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (const WeightType type : kPackedTypes) {
      CAPTURE(static_cast<int>(type));
      const Weight weight(40, 96, type, random);
      constexpr size_t kTokens = 5;
      const std::vector<float> good = random.floats(kTokens * 96, -1, 1);
      std::vector<float> expected(kTokens * 40);
      linear(*path, weight.view(), {.x = good.data(), .stride = 96}, {}, kTokens, expected.data(), {});
      for (const float wrong : {kNaN, kInfinity, -kInfinity}) {
        std::vector<float> x = good;
        x[2 * 96 + random.below(96)] = wrong;
        std::vector<float> out(kTokens * 40);
        linear(*path, weight.view(), {.x = x.data(), .stride = 96}, {}, kTokens, out.data(), {});
        bool all = true;
        for (size_t i = 0; i < out.size(); ++i) all = all && (i / 40 == 2 ? std::isnan(out[i]) : out[i] == expected[i]);
        CHECK(all);
      }
    }
  }
}

TEST_CASE("linear: allocates nothing after the first call" * doctest::skip(!test::kCountsAllocations)) {
  Random random(8);
  const Weight weight(1024, 512, WeightType::int4, random);
  const std::vector<float> x = random.floats(20 * 1024, -1, 1);
  const std::vector<float> norm_weight(512, 1.0F);
  std::vector<float> out(20 * 1024);
  Threads threads(4, true);
  const auto run = [&](LinearInput::Kind kind, size_t tokens) {
    const LinearInput input{kind, x.data(), 1024, norm_weight.data(), 1e-6F};
    linear(simd(), weight.view(), input, {x.data()}, tokens, out.data(), threads.parallel());
    linear(simd(), weight.view(), input, {}, tokens, out.data(), {});
    linear(simd(), weight.view(), input, {x.data(), x.data(), 1e-6F}, tokens, out.data(), threads.parallel());
  };
  run(LinearInput::Kind::plain, 20);
  const uint64_t before = test::allocations();
  for (const size_t tokens : {20, 1, 7}) {
    using Kind = LinearInput::Kind;
    for (const auto kind : {Kind::plain, Kind::norm, Kind::swiglu, Kind::geglu}) run(kind, tokens);
  }
  const uint64_t made = test::allocations() - before;
  CHECK(made == 0);
}

TEST_CASE("embedding: rows of the matrix") {
  Random random(9);
  for (const WeightType type : kPackedTypes) {
    const Weight weight(37, 96, type, random);
    const std::vector<int64_t> ids = {0, 36, 15, 16, 31, 32, 0};
    std::vector<float> out(ids.size() * 96);
    embedding(weight.view(), ids.data(), ids.size(), out.data());
    Errors errors;  // 11 bits times 8 are exact, plus a minimum they are rounded once
    for (size_t t = 0; t < ids.size(); ++t) {
      const auto id = static_cast<size_t>(ids[t]);
      for (size_t i = 0; i < 96; ++i)
        errors.add(out[t * 96 + i], weight.at(id, i), weight.minimum ? kRounding * weight.magnitude(id, i) : 0);
    }
    CHECK(errors.worst() <= 1);
  }
}

}  // namespace
}  // namespace meki
