// What attention is made of (kernels/simd.h), for every path that this CPU runs, against naive loops in double
// precision.

#include <algorithm>
#include <bit>
#include <limits>
#include <numbers>
#include <numeric>
#include <set>

#include "runtime/kernels/simd/simd.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::Bytes;
using test::Errors;
using test::head_dims;
using test::kKvTypes;
using test::kRounding;
using test::QuerySet;
using test::Random;
using test::random_block;
using test::Stored;
using test::stored_key;
using test::stored_value;

constexpr size_t kBlock = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 32};

// Calls test(path, layout, random) for all paths, types and head dims.
template <class Test>
void for_layouts(Test test) {
  for (const Simd* path : simd_paths()) {
    for (const KvType type : kKvTypes) {
      for (const size_t head_dim : head_dims(type)) {
        CAPTURE(path->name);
        CAPTURE(name_of(type));
        CAPTURE(head_dim);
        Random random(static_cast<uint32_t>(head_dim));
        test(*path, KvLayout(type, 1, head_dim), random);
      }
    }
  }
}

TEST_CASE("simd paths: best first, portable last") {
  const std::span<const Simd* const> paths = simd_paths();
  REQUIRE_FALSE(paths.empty());
  CHECK(&simd() == paths.front());
  CHECK(paths.back()->name == "portable");
  std::set<std::string_view> names;
  for (const Simd* path : paths) names.insert(path->name);
  CHECK(names.size() == paths.size());
}

// Compares all scores with the dot products of what is stored.
void check_scores(const Simd& path, const KvLayout& layout, const QuerySet& queries, const std::byte* block) {
  const size_t head_dim = layout.head_dim;
  const bool integer = layout.type == KvType::int8 || layout.type == KvType::int4;
  std::vector<float> scores(queries.count * kBlock + 1, kNaN);
  path.scores[static_cast<size_t>(layout.type)](queries.view(), block, scores.data());
  Errors errors;
  for (size_t p = 0; p < kBlock; ++p) {
    std::vector<Stored> key(head_dim);
    for (size_t e = 0; e < head_dim; ++e) key[e] = stored_key(layout.type, head_dim, block, p, e);
    for (size_t q = 0; q < queries.count; ++q) {
      double exact = 0;
      double magnitude = 0;
      double sum = 0;  // of integers: exact
      for (size_t e = 0; e < head_dim; ++e) {
        if (!integer) {
          const double product = queries.values[q * head_dim + e] * key[e].value();
          exact += product;
          magnitude += std::fabs(product);
          continue;
        }
        sum += queries.code(q, e) * key[e].code;
        if (e + 1 == head_dim || (layout.type == KvType::int4 && e % 32 == 31)) {
          const double product = sum * key[e].scale * queries.scales[q];
          exact += product;
          magnitude += std::fabs(product);
          sum = 0;
        }
      }
      // float types round every product and sum. Integer sums are exact: what is rounded is one sum for all of int8,
      // one for 32 elements of int4, with two scales each.
      const size_t roundings = 4 + (integer ? head_dim / 32 : head_dim);
      errors.add(scores[q * kBlock + p], exact, static_cast<double>(roundings) * kRounding * magnitude);
    }
  }
  CHECK(errors.worst() <= 1);
  CHECK(std::isnan(scores.back()));
}

TEST_CASE("scores: every path against the dot product of what is stored") {
  for_layouts([](const Simd& path, const KvLayout& layout, Random& random) {
    const Bytes block = random_block(layout, random);
    for (const size_t count : kCounts) {
      CAPTURE(count);
      check_scores(path, layout, {count, layout.head_dim, random.floats(count * layout.head_dim, -3, 3)}, block.data());
    }
  });
}

TEST_CASE("scores: the largest codes do not overflow") {
  for_layouts([](const Simd& path, const KvLayout& layout, Random& random) {
    const size_t head_dim = layout.head_dim;
    Bytes block(layout.block_bytes());
    for (size_t slot = 0; slot < kBlock; ++slot) {  // all of one sign, or signs at random
      std::vector<float> key(head_dim, slot % 2 == 0 ? 1.0F : -1.0F);
      if (slot >= 32) std::ranges::generate(key, [&] { return random.below(2) == 0 ? 1.0F : -1.0F; });
      append(layout, block.data(), slot, key.data(), key.data());
    }
    for (const float value : {1.0F, -1.0F}) {
      const QuerySet queries(5, head_dim, std::vector<float>(5 * head_dim, value));
      check_scores(path, layout, queries, block.data());
    }
  });
}

// Rows of weights as the softmax gives them: some are 0, and some rows are small as a whole or 0.
std::vector<float> random_weights(size_t count, Random& random) {
  std::vector<float> weights(count * kBlock);
  for (size_t q = 0; q < count; ++q) {
    const float largest = q % 5 == 4 ? 0.0F : std::ldexp(1.0F, -random.between(0, 20));
    const size_t visible = 1 + random.below(kBlock);
    for (size_t p = 0; p < visible; ++p) weights[q * kBlock + p] = random.uniform(0, largest);
  }
  return weights;
}

TEST_CASE("values: every path against the weighted sum of what is stored, and against the portable one") {
  for_layouts([](const Simd& path, const KvLayout& layout, Random& random) {
    const size_t head_dim = layout.head_dim;
    const auto type = static_cast<size_t>(layout.type);
    const bool integer = layout.type == KvType::int8 || layout.type == KvType::int4;
    const Bytes block = random_block(layout, random);
    const std::byte* const values = block.data() + layout.values_offset();
    for (const size_t count : kCounts) {
      CAPTURE(count);
      const std::vector<float> weights = random_weights(count, random);
      const std::vector<float> before = random.floats(count * head_dim, -1, 1);
      std::vector<float> outputs = before;
      outputs.push_back(kNaN);
      path.values[type](weights.data(), count, head_dim, values, outputs.data());
      CHECK(std::isnan(outputs.back()));
      std::vector<float> portable = before;
      simd_paths().back()->values[type](weights.data(), count, head_dim, values, portable.data());

      Errors errors;
      Errors differences;
      for (size_t e = 0; e < head_dim; ++e) {
        std::vector<Stored> value(kBlock);
        for (size_t p = 0; p < kBlock; ++p) value[p] = stored_value(layout.type, head_dim, block.data(), p, e);
        for (size_t q = 0; q < count; ++q) {
          double exact = before[q * head_dim + e];
          double magnitude = std::fabs(exact);
          double largest = 0;
          double codes = 0;
          for (size_t p = 0; p < kBlock; ++p) {
            const double weight = weights[q * kBlock + p];
            exact += weight * value[p].value();
            magnitude += std::fabs(weight * value[p].value());
            largest = std::max(largest, weight * value[p].scale);
            codes += std::fabs(value[p].code);
          }
          // float types round every product and sum. Integer types round each weight * scale to a multiple of
          // largest / 255, by half of one (a little more: 255 * 4 * 2^-24, for three roundings on the way).
          const double weight_error = integer ? largest / 255 * 0.5001 * codes : 0;
          errors.add(outputs[q * head_dim + e], exact, weight_error + 66 * kRounding * (magnitude + weight_error));
          // Once rounded, integers are exact and the same everywhere: what differs is one product and one sum.
          if (integer) {
            const double both = std::fabs(portable[q * head_dim + e]) + 2 * std::fabs(before[q * head_dim + e]);
            differences.add(outputs[q * head_dim + e], portable[q * head_dim + e], 4 * kRounding * both);
          }
        }
      }
      CHECK(errors.worst() <= 1);
      CHECK(differences.worst() <= 1);
    }
  });
}

TEST_CASE("values: weights of 0 leave the outputs alone, the largest codes do not overflow") {
  for_layouts([](const Simd& path, const KvLayout& layout, Random&) {
    const size_t head_dim = layout.head_dim;
    const auto values = path.values[static_cast<size_t>(layout.type)];
    Bytes block(layout.block_bytes());
    for (const float value : {1.0F, -1.0F}) {
      const std::vector<float> row(head_dim, value);
      for (size_t slot = 0; slot < kBlock; ++slot) append(layout, block.data(), slot, row.data(), row.data());
      std::vector<float> outputs(5 * head_dim, 0.25F);
      const std::byte* const stored = block.data() + layout.values_offset();
      values(std::vector<float>(5 * kBlock, 0.0F).data(), 5, head_dim, stored, outputs.data());
      Errors unchanged;
      for (const float output : outputs) unchanged.add(output, 0.25, 0);
      CHECK(unchanged.worst() == 0);
      // Every weight * scale is the largest: no rounding to 8 bits. 1 / 7 as a half is up to 2^-11 off.
      values(std::vector<float>(5 * kBlock, 1.0F).data(), 5, head_dim, stored, outputs.data());
      Errors errors;
      const double scale_error = layout.type == KvType::int4 ? 0x1p-11 : 0;
      for (const float output : outputs) errors.add(output, 0.25 + 64 * value, 64 * (70 * kRounding + scale_error));
      CHECK(errors.worst() <= 1);
    }
  });
}

TEST_CASE("hadamard: its own inverse, the same bits on every path") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(14);
    for (const size_t size : {16, 32, 48, 64, 80, 96, 128, 256, 512}) {
      CAPTURE(size);
      const size_t run = size & (~size + 1);
      const std::vector<float> x = random.floats(size, -3, 3);
      std::vector<float> got = x;
      path->hadamard(got.data(), size);
      std::vector<float> portable = x;
      simd_paths().back()->hadamard(portable.data(), size);
      CHECK(got == portable);
      Errors errors;
      for (size_t i = 0; i < size; ++i) {  // Sylvester's matrix: -1 to the number of bits that i and j have in common
        double exact = 0;
        double magnitude = 0;
        for (size_t j = i / run * run; j < (i / run + 1) * run; ++j) {
          exact += std::popcount(i & j & (run - 1)) % 2 == 0 ? x[j] : -x[j];
          magnitude += std::fabs(x[j]);
        }
        const double norm = 1 / std::sqrt(static_cast<double>(run));
        errors.add(got[i], exact * norm, 12 * kRounding * magnitude * norm);  // at most 9 levels and the norm
      }
      path->hadamard(got.data(), size);
      for (size_t i = 0; i < size; ++i)
        errors.add(got[i], x[i], 24 * kRounding * 3 * std::sqrt(static_cast<double>(run)));
      CHECK(errors.worst() <= 1);
    }
  }
}

TEST_CASE("rotate: RMSNorm and RoPE of a head, the same bits on every path") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(16);
    Errors errors;
    for (const size_t size : {16, 32, 48, 64, 80, 128, 256, 272, 512}) {
      CAPTURE(size);
      const size_t half = size / 2;
      const std::vector<float> x = random.floats(size, -3, 3);
      const std::vector<float> weight = random.floats(size, -2, 2);
      const std::vector<float> cos = random.floats(half, -1, 1);
      const std::vector<float> sin = random.floats(half, -1, 1);
      for (const float* const w : {weight.data(), static_cast<const float*>(nullptr)}) {
        std::vector<float> got(size + 1, 9);
        path->rotate(x.data(), size, 0.7F, w, cos.data(), sin.data(), 0.3F, got.data());
        CHECK(got.back() == 9);
        std::vector<float> portable = x;  // in place
        simd_paths().back()->rotate(portable.data(), size, 0.7F, w, cos.data(), sin.data(), 0.3F, portable.data());
        CHECK(std::equal(portable.begin(), portable.end(), got.begin()));
        for (size_t i = 0; i < size; ++i) {
          const size_t other = (i + half) % size;
          const auto normed = [&](size_t e) { return w == nullptr ? x[e] : double{x[e]} * double{0.7F} * w[e]; };
          const double a = normed(i) * cos[i % half] * double{0.3F};
          const double b = normed(other) * sin[i % half] * double{0.3F};
          // Of each product five roundings at most, and that of the sum.
          errors.add(got[i], i < half ? a - b : a + b, 6 * kRounding * (std::fabs(a) + std::fabs(b)));
        }
      }
    }
    CHECK(errors.worst() <= 1);
  }
}

TEST_CASE("quantize_head: half a step, the same bits on every path") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(15);
    Errors errors;
    for (const size_t size : {16, 32, 48, 64, 80, 128, 256, 272, 512}) {
      CAPTURE(size);
      for (const float wrong : {0.0F, kNaN, kInfinity, -kInfinity}) {
        CAPTURE(wrong);
        std::vector<float> x = random.floats(size, -3, 3);
        const size_t place = random.below(size);
        if (wrong != 0) x[place] = wrong;
        std::vector<int8_t> codes(size + 1, 99);
        std::vector<int32_t> sums(size / 16 + 1, 99);
        const float scale = path->quantize_head(x.data(), size, codes.data(), sums.data());
        CHECK(codes.back() == 99);  // nothing is written behind the end
        CHECK(sums.back() == 99);
        std::vector<int8_t> portable(size + 1, 99);
        const float expected = simd_paths().back()->quantize_head(x.data(), size, portable.data(), nullptr);
        CHECK(std::isfinite(scale) == (wrong == 0));
        if (wrong != 0) {
          CHECK(std::ranges::min(codes) >= -127);
          continue;
        }
        CHECK(codes == portable);
        CHECK(scale == expected);
        CHECK(scale == std::fabs(*std::ranges::max_element(x, {}, [](float y) { return std::fabs(y); })) / 127);
        for (size_t i = 0; i < size; ++i) {
          errors.add(codes[i], x[i] / double{scale}, 0.5 + 127 * 4 * kRounding);  // rounding of scale and product
        }
        for (size_t g = 0; g < size / 16; ++g) {
          CHECK(sums[g] == std::accumulate(codes.begin() + 16 * g, codes.begin() + 16 * (g + 1), 0));
        }
      }
    }
    const std::vector<float> zeros(48);
    std::vector<int8_t> codes(48, 99);
    CHECK(path->quantize_head(zeros.data(), 48, codes.data(), nullptr) == 0);
    CHECK(codes == std::vector<int8_t>(48));
    CHECK(errors.worst() <= 1);
  }
}

double unit_in_last_place(double value) {
  return std::ldexp(1.0, std::max(value > 0 ? std::ilogb(value) : -200, -126) - 23);
}

TEST_CASE("softmax: exp within 1 ulp, down to what rounds to 0") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(11);
    Errors errors;
    std::vector<float> output(16);
    for (int i = 0; i < 2000; ++i) {
      // Of 64 scores, the largest is 0: score - maximum is exact.
      std::vector<float> scores = random.floats(kBlock, i % 2 == 0 ? -1.0F : -110.0F, 0);
      scores[random.below(kBlock)] = 0;
      const std::vector<float> before = scores;
      float maximum = -kInfinity;
      float sum = 0;
      path->softmax(scores.data(), &maximum, &sum, output.data(), output.size());
      CHECK(maximum == 0);
      for (size_t p = 0; p < kBlock; ++p) {
        const double exact = std::exp(double{before[p]});
        errors.add(scores[p], exact, unit_in_last_place(exact));
      }
    }
    CHECK(errors.worst() <= 1);
  }
}

TEST_CASE("softmax: block after block, as one softmax over all scores") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(12);
    for (const size_t head_dim : {16, 48, 256}) {
      for (int round = 0; round < 50; ++round) {
        const std::vector<float> initial = random.floats(head_dim, -1, 1);
        std::vector<float> output = initial;
        std::vector<float> seen;
        float maximum = -kInfinity;
        float sum = 0;
        for (int block = 0; block < 4; ++block) {
          std::vector<float> scores = random.floats(kBlock, -8, random.uniform(0, 20));
          // The first rounds begin with a block that is masked entirely; all others mask some.
          for (float& score : scores) {
            if ((round < 10 && block == round % 4) || random.below(3) == 0) score = -kInfinity;
          }
          const std::vector<float> masked = scores;
          const float maximum_before = maximum;
          const std::vector<float> output_before = output;
          path->softmax(scores.data(), &maximum, &sum, output.data(), head_dim);
          seen.insert(seen.end(), masked.begin(), masked.end());
          REQUIRE(maximum == *std::max_element(seen.begin(), seen.end()));

          // A difference of floats is off by 2^-24 of itself, and so is the exponential's relative error.
          const double range = 60 * kRounding;
          Errors errors;
          double total = 0;
          for (const float score : seen) total += score == -kInfinity ? 0 : std::exp(double{score} - maximum);
          for (size_t p = 0; p < kBlock; ++p) {
            const double exact = masked[p] == -kInfinity ? 0 : std::exp(double{masked[p]} - maximum);
            errors.add(scores[p], exact, exact * range);
          }
          errors.add(sum, total, total * (256 * kRounding + 4 * range));
          const double shrink = maximum_before == maximum ? 1 : std::exp(double{maximum_before} - maximum);
          for (size_t e = 0; e < head_dim; ++e) {
            errors.add(output[e], output_before[e] * shrink, std::fabs(output_before[e]) * shrink * range);
          }
          REQUIRE(errors.worst() <= 1);
        }
      }
    }
  }
}

TEST_CASE("softmax: a NaN score makes the sum NaN for good, wherever it is") {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    for (size_t where = 0; where <= kBlock; ++where) {
      CAPTURE(where);
      for (const bool first : {true, false}) {
        CAPTURE(first);
        std::vector<float> output(16, 1.0F);
        std::vector<float> good(kBlock, 1.0F);
        std::vector<float> bad(kBlock, where % 2 == 0 ? 0.5F : -kInfinity);
        if (where < kBlock) bad[where] = kNaN;
        if (where == kBlock) std::ranges::fill(bad, kNaN);
        float maximum = -kInfinity;
        float sum = 0;
        if (!first) path->softmax(std::vector<float>(good).data(), &maximum, &sum, output.data(), 16);
        path->softmax(bad.data(), &maximum, &sum, output.data(), 16);
        path->softmax(good.data(), &maximum, &sum, output.data(), 16);
        CHECK(std::isnan(sum));
      }
    }
  }
}

// out = gate * sigmoid(argument(gate)) * up; `roundings` of the argument.
void check_gated(decltype(Simd::swiglu) Simd::* gated, double (*argument)(double), double roundings) {
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Random random(13);
    for (const float range : {0.01F, 1.0F, 10.0F, 200.0F}) {
      const std::vector<float> gate = random.floats(1600, -range, range);
      const std::vector<float> up = random.floats(1600, -3, 3);
      std::vector<float> out(1601, kNaN);
      (path->*gated)(gate.data(), up.data(), 1600, out.data());
      CHECK(std::isnan(out.back()));
      Errors errors;
      for (size_t i = 0; i < 1600; ++i) {
        const double a = argument(gate[i]);
        const double exact = gate[i] / (1 + std::exp(-a)) * up[i];
        // exp is off by up to 2^-23, four operations round, and an error of the argument is one of sigmoid(a) times
        // 1 - sigmoid(a); where e^a is no normal float, all that is left may go.
        const double relative = 8 + roundings * std::fabs(a) / (1 + std::exp(a));
        errors.add(out[i], exact, relative * kRounding * std::fabs(exact) + 0x1p-126 * 88 * std::fabs(up[i]));
      }
      CHECK(errors.worst() <= 1);
    }
    std::vector<float> up(16, 1.0F);
    std::vector<float> out(16);
    for (const float large : {1e4F, 1e13F, 1e20F, 3e38F}) {
      CAPTURE(large);
      const std::vector<float> gates(16, large);
      (path->*gated)(gates.data(), up.data(), 16, out.data());
      CHECK(out == gates);
      (path->*gated)(std::vector<float>(16, -large).data(), up.data(), 16, out.data());
      CHECK(out == std::vector<float>(16, 0.0F));
    }
    std::vector<float> gate(16, 1.0F);
    gate[3] = up[9] = kNaN;
    gate[12] = -kNaN;
    (path->*gated)(gate.data(), up.data(), 16, out.data());
    for (size_t i = 0; i < 16; ++i) CHECK(std::isnan(out[i]) == (i == 3 || i == 9 || i == 12));
  }
}

TEST_CASE("swiglu: silu(gate) * up") {
  check_gated(&Simd::swiglu, [](double x) { return x; }, 0);
}

TEST_CASE("geglu: GELU(gate) * up, in its tanh form") {
  // (1 + tanh(a / 2)) / 2 is sigmoid(a). Three constants are rounded and four operations on numbers of one sign.
  const auto argument = [](double x) { return 2 * std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x); };
  check_gated(&Simd::geglu, argument, 8);
}

TEST_CASE("NaN: a key's reaches its scores, a value's all outputs that it weighs in") {
  for_layouts([](const Simd& path, const KvLayout& layout, Random& random) {
    const size_t head_dim = layout.head_dim;
    const auto type = static_cast<size_t>(layout.type);
    for (const size_t slot : {0, 5, 31, 32, 63}) {
      CAPTURE(slot);
      Bytes block = random_block(layout, random);
      std::vector<float> row = random.floats(head_dim, -1, 1);
      const size_t where = random.below(head_dim);
      row[where] = kNaN;
      append(layout, block.data(), slot, row.data(), row.data());
      const QuerySet queries(5, head_dim, random.floats(5 * head_dim, 1, 2));
      std::vector<float> scores(5 * kBlock);
      path.scores[type](queries.view(), block.data(), scores.data());
      for (size_t i = 0; i < scores.size(); ++i) REQUIRE(std::isnan(scores[i]) == (i % kBlock == slot));

      std::vector<float> outputs(5 * head_dim);
      path.values[type](random.floats(5 * kBlock, 0.1F, 1).data(), 5, head_dim, block.data() + layout.values_offset(),
                        outputs.data());
      bool all = true;
      for (size_t q = 0; q < 5; ++q) all = all && std::isnan(outputs[q * head_dim + where]);
      CHECK(all);
    }
  });
}

}  // namespace
}  // namespace meki
