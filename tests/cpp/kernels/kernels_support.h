#pragma once

// What the kernel tests share: random data, and readings of the KV cache and of packed weights that are written from
// their descriptions (kernels/kv_cache.h, docs/package-format.md) alone, without any code of the runtime.

#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "runtime/base/parallel.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/kernels/linear.h"
#include "runtime/kernels/simd/simd.h"
#include "tests/cpp/support.h"

namespace meki::test {

// The largest relative error of one float32 rounding; what n of them add up to is below (n + 1) * kRounding for any n
// here.
inline constexpr double kRounding = 0x1p-24;
using Bytes = std::vector<std::byte>;
inline constexpr WeightType kPackedTypes[] = {WeightType::int8, WeightType::int4, WeightType::int4_minimum,
                                              WeightType::int8_minimum, WeightType::int8_16};
inline constexpr KvType kKvTypes[] = {KvType::float32, KvType::float16, KvType::int8, KvType::int4};

// Head dims worth a test: what a type allows, with and without remainders.
std::vector<size_t> head_dims(KvType type);

// Seeded; the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint32_t seed) : generator_(seed) {}
  size_t below(size_t end) { return generator_() % end; }
  int between(int first, int last) { return first + static_cast<int>(below(static_cast<size_t>(last - first) + 1)); }
  float uniform(float first, float last) {
    return first + (last - first) * static_cast<float>(below(1 << 24)) * 0x1p-24F;
  }
  std::vector<float> floats(size_t count, float first, float last);

 private:
  std::mt19937 generator_;
};

// The largest error of many comparisons, as a fraction of what each allows. NaN once it was.
class Errors {
 public:
  void add(double got, double expected, double bound);
  double worst() const { return worst_; }

 private:
  double worst_ = 0;
};

// The nearest half, ties to even, by its definition.
uint16_t naive_to_half(double value);

// What is stored of one element of a key or value: value = code * scale. float types have a scale of 1.
struct Stored {
  double code;
  double scale;
  double value() const { return code * scale; }
};
Stored stored_key(KvType type, size_t head_dim, const std::byte* block, size_t position, size_t element);
Stored stored_value(KvType type, size_t head_dim, const std::byte* block, size_t position, size_t element);

// One full block of random keys and values of one head. Magnitudes differ from position to position.
Bytes random_block(const KvLayout& layout, Random& random);

// Runs pieces on new threads; or, if `reversed`, on this one, one after the other in reverse, which cuts the work in
// the same way.
class Threads {
 public:
  explicit Threads(size_t count, bool reversed = false) : count_(count), reversed_(reversed) {}
  Parallel parallel() { return {count_, this, run}; }

 private:
  static void run(void* self, size_t pieces, void (*piece)(void* data, size_t index), void* data);

  size_t count_;
  bool reversed_;
};

// Queries and their 8-bit codes.
struct QuerySet {
  size_t count;
  size_t head_dim;
  std::vector<float> values;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  QuerySet(size_t count, size_t head_dim, std::vector<float> values);
  Queries view() const;
  int code(size_t query, size_t element) const { return codes[query * head_dim + element]; }
};

// Inputs of a linear layer in 8 bits.
struct ActivationSet {
  size_t tokens;
  size_t inputs;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> excess;

  ActivationSet(size_t tokens, size_t inputs, std::vector<int8_t> codes, std::vector<float> scales);
  Activations view() const { return {tokens, inputs, codes.data(), scales.data(), excess.data()}; }
};

// A weight matrix [outputs, inputs] with random scales, of either sign, and minimums, and its packed panels.
struct Weight {
  size_t outputs;
  size_t inputs;
  WeightType type;
  size_t group;                    // inputs that share a scale
  bool minimum;                    // whether values have one
  std::vector<int> codes;          // [outputs, inputs]
  std::vector<uint16_t> scales;    // [outputs, inputs / group], halves
  std::vector<uint16_t> minimums;  // [outputs, inputs / 32], halves
  Bytes packed;

  Weight(size_t outputs, size_t inputs, WeightType type, std::vector<int> codes, Random& random);
  // With random codes.
  Weight(size_t outputs, size_t inputs, WeightType type, Random& random);
  PackedWeight view() const { return {packed.data(), outputs, inputs, type}; }
  int code(size_t output, size_t input) const { return codes[output * inputs + input]; }
  // Of the codes, and what comes on top.
  double scaled(size_t output, size_t input) const {
    return double{naive_half(scales[(output * inputs + input) / group])} * code(output, input);
  }
  double offset(size_t output, size_t input) const {
    return minimum ? naive_half(minimums[(output * inputs + input) / 32]) : 0;
  }
  double at(size_t output, size_t input) const { return scaled(output, input) + offset(output, input); }
  // What float32 rounds relative to, of at().
  double magnitude(size_t output, size_t input) const {
    return std::fabs(scaled(output, input)) + std::fabs(offset(output, input));
  }
};
// Least and greatest code.
std::pair<int, int> code_range(WeightType type);

// What linear() makes of an input, and what float32 may change of it.
struct Product {
  std::vector<double> exact;   // [tokens, outputs]
  std::vector<double> bounds;  // as exact
};
// The input [tokens, inputs] is rounded to 8 bits in blocks of 32, the rest is exact. `errors` says by how much each of
// its elements may be off: some of them may be rounded to another code then.
Product naive_linear(const Weight& weight, const std::vector<double>& input, const std::vector<double>& errors);

// x / sqrt(mean(x^2) + epsilon) * weight, and what float32 may change of it if x may be off by `errors`.
Product naive_norm(std::span<const double> x, std::span<const double> errors, const std::vector<float>& weight,
                   float epsilon);
// residual (null: 0) + the norm of each token's outputs.
void naive_post_norm(Product& product, const std::vector<float>& weight, float epsilon, const float* residual);

}  // namespace meki::test
