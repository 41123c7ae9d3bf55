#include "tests/cpp/kernels/kernels_support.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

namespace meki::test {
namespace {

constexpr size_t kBlock = 64;

template <class T>
T load(const std::byte* from, size_t index) {
  T value;
  std::memcpy(&value, from + index * sizeof(T), sizeof(T));
  return value;
}

double nibble(const std::byte* from, size_t index, bool high) {
  const int byte = std::to_integer<int>(from[index]);
  return (high ? byte / 16 : byte % 16) - 8;
}

// Where a block's values begin.
size_t keys_bytes(KvType type, size_t head_dim) {
  switch (type) {
    case KvType::float32: return 64 * head_dim * 4;
    case KvType::float16: return 64 * head_dim * 2;
    case KvType::int8: return 64 * 4 + 64 * head_dim;
    case KvType::int4: return head_dim / 32 * 64 * 2 + 64 * head_dim / 2;
  }
  return 0;
}

std::vector<int> random_codes(size_t count, WeightType type, Random& random) {
  const auto [least, greatest] = code_range(type);
  std::vector<int> codes(count);
  for (int& code : codes) code = random.between(least, greatest);
  return codes;
}

}  // namespace

std::vector<size_t> head_dims(KvType type) {
  if (type == KvType::int4) return {32, 64, 128, 256};
  return {16, 32, 48, 80, 128, 256};
}

std::vector<float> Random::floats(size_t count, float first, float last) {
  std::vector<float> values(count);
  for (float& value : values) value = uniform(first, last);
  return values;
}

void Errors::add(double got, double expected, double bound) {
  const double ratio = got == expected ? 0 : std::fabs(got - expected) / bound;
  if (!(ratio <= worst_) && !std::isnan(worst_)) worst_ = ratio;
}

uint16_t naive_to_half(double value) {
  const unsigned sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 65520) return static_cast<uint16_t>(sign | 0x7C00);  // the middle between 65504 and 65536
  // Halves are multiples of 2^-24, and of 2^(e - 10) from 2^e on; their bits are in the order of their values.
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign + static_cast<unsigned>(exponent + 14) * 1024 + units);
}

Stored stored_key(KvType type, size_t head_dim, const std::byte* block, size_t position, size_t element) {
  const size_t p = position;
  const size_t e = element;
  switch (type) {
    case KvType::float32: return {load<float>(block, e * 64 + p), 1};
    case KvType::float16: return {naive_half(load<uint16_t>(block, e * 64 + p)), 1};
    case KvType::int8:
      return {static_cast<double>(load<int8_t>(block + 256, (e / 4 * 64 + p) * 4 + e % 4)), load<float>(block, p)};
    case KvType::int4: {
      const size_t g = e / 32;
      const size_t i = e % 16 / 4;
      const size_t b = e % 4;
      const std::byte* const codes = block + head_dim / 32 * 64 * 2;
      return {nibble(codes, ((g * 4 + i) * 64 + p) * 4 + b, e % 32 >= 16),
              naive_half(load<uint16_t>(block, g * 64 + p))};
    }
  }
  return {};
}

Stored stored_value(KvType type, size_t head_dim, const std::byte* block, size_t position, size_t element) {
  const std::byte* const values = block + keys_bytes(type, head_dim);
  const size_t p = position;
  const size_t e = element;
  switch (type) {
    case KvType::float32: return {load<float>(values, p * head_dim + e), 1};
    case KvType::float16: return {naive_half(load<uint16_t>(values, p * head_dim + e)), 1};
    case KvType::int8:
      return {static_cast<double>(load<int8_t>(values + 256, (p / 4 * head_dim + e) * 4 + p % 4)),
              load<float>(values, p)};
    case KvType::int4: {
      const size_t i = p % 32 / 4;
      const size_t b = p % 4;
      const std::byte* const codes = values + head_dim / 32 * 64 * 2;
      return {nibble(codes, (i * head_dim + e) * 4 + b, p >= 32), naive_half(load<uint16_t>(values, e / 32 * 64 + p))};
    }
  }
  return {};
}

Bytes random_block(const KvLayout& layout, Random& random) {
  Bytes block(layout.block_bytes());
  for (size_t slot = 0; slot < kBlock; ++slot) {
    const float key = random.uniform(0.01F, 4);
    const float value = random.uniform(0.01F, 4);
    append(layout, block.data(), slot, random.floats(layout.head_dim, -key, key).data(),
           random.floats(layout.head_dim, -value, value).data());
  }
  return block;
}

void Threads::run(void* self, size_t pieces, void (*piece)(void* data, size_t index), void* data) {
  const auto& threads = *static_cast<const Threads*>(self);
  if (threads.reversed_) {
    for (size_t index = pieces; index-- > 0;) piece(data, index);
    return;
  }
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t index = next++; index < pieces; index = next++) piece(data, index);
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads.count_; ++i) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

QuerySet::QuerySet(size_t count_, size_t head_dim_, std::vector<float> values_)
    : count(count_),
      head_dim(head_dim_),
      values(std::move(values_)),
      codes(count * head_dim),
      scales(count),
      sums(count * head_dim / 16) {
  for (size_t q = 0; q < count; ++q) {
    double largest = 0;
    for (size_t e = 0; e < head_dim; ++e) largest = std::max(largest, std::fabs(double{values[q * head_dim + e]}));
    scales[q] = static_cast<float>(largest / 127);
    for (size_t i = q * head_dim; i < (q + 1) * head_dim; ++i) {
      codes[i] = static_cast<int8_t>(largest > 0 ? std::lround(values[i] / largest * 127) : 0);
      sums[i / 16] += codes[i];
    }
  }
}

Queries QuerySet::view() const { return {count, head_dim, values.data(), codes.data(), scales.data(), sums.data()}; }

ActivationSet::ActivationSet(size_t tokens_, size_t inputs_, std::vector<int8_t> codes_, std::vector<float> scales_)
    : tokens(tokens_),
      inputs(inputs_),
      codes(std::move(codes_)),
      scales(std::move(scales_)),
      excess(tokens * inputs / 16) {
  for (size_t i = 0; i < codes.size(); ++i) {
    excess[i / 32 * 2] -= 8 * codes[i];
    if (i % 32 < 16) excess[i / 32 * 2 + 1] -= 8 * codes[i];
  }
}

std::pair<int, int> code_range(WeightType type) {
  switch (type) {
    case WeightType::int4: return {-8, 7};
    case WeightType::int4_minimum: return {0, 15};
    default: return {-128, 127};
  }
}

Weight::Weight(size_t outputs_, size_t inputs_, WeightType type_, Random& random)
    : Weight(outputs_, inputs_, type_, random_codes(outputs_ * inputs_, type_, random), random) {}

Weight::Weight(size_t outputs_, size_t inputs_, WeightType type_, std::vector<int> codes_, Random& random)
    : outputs(outputs_),
      inputs(inputs_),
      type(type_),
      group(type == WeightType::int8_16 ? 16 : 32),
      minimum(type == WeightType::int4_minimum || type == WeightType::int8_minimum),
      codes(std::move(codes_)),
      scales(outputs * inputs / group),
      minimums(minimum ? outputs * inputs / 32 : 0) {
  const bool nibbles = type == WeightType::int4 || type == WeightType::int4_minimum;
  const int zero = type == WeightType::int4_minimum ? 0 : nibbles ? 8 : 128;
  const float largest = nibbles ? 0.02F : 0.00125F;
  for (uint16_t& scale : scales) scale = naive_to_half(random.uniform(-largest / 4, largest));
  for (uint16_t& half : minimums) half = naive_to_half(random.uniform(-8 * largest, largest));

  const auto add_halves = [&](size_t panel, const std::vector<uint16_t>& halves, size_t columns, size_t column) {
    for (size_t row = panel * 16; row < panel * 16 + 16; ++row) {
      const uint16_t half = row < outputs ? halves[row * columns + column] : uint16_t{0};
      packed.push_back(static_cast<std::byte>(half % 256));
      packed.push_back(static_cast<std::byte>(half / 256));
    }
  };
  for (size_t panel = 0; panel < (outputs + 15) / 16; ++panel) {
    for (size_t block = 0; block < inputs / 32; ++block) {
      for (size_t i = 0; i < (nibbles ? 4 : 8); ++i) {
        for (size_t row = panel * 16; row < panel * 16 + 16; ++row) {
          for (size_t column = 4 * i; column < 4 * i + 4; ++column) {
            const auto code_of = [&](size_t at) {
              return static_cast<unsigned>((row < outputs ? code(row, block * 32 + at) : 0) + zero);
            };
            packed.push_back(
                static_cast<std::byte>(nibbles ? code_of(column) + 16 * code_of(16 + column) : code_of(column)));
          }
        }
      }
      for (size_t g = 0; g < 32 / group; ++g) add_halves(panel, scales, inputs / group, block * (32 / group) + g);
      if (minimum) add_halves(panel, minimums, inputs / 32, block);
    }
  }
}

Product naive_linear(const Weight& weight, const std::vector<double>& input, const std::vector<double>& errors) {
  const size_t tokens = input.size() / weight.inputs;
  const size_t blocks = weight.inputs / 32;
  Product product{std::vector<double>(tokens * weight.outputs), std::vector<double>(tokens * weight.outputs)};
  for (size_t block = 0; block < tokens * blocks; ++block) {
    const std::span<const double> x = std::span(input).subspan(block * 32, 32);
    const std::span<const double> error = std::span(errors).subspan(block * 32, 32);
    double largest = 0;
    for (const double value : x) largest = std::max(largest, std::fabs(value));
    if (largest == 0) continue;
    // Relative errors of the scale, and of each of the block's products: some operations, and a sum over blocks.
    const double scale_error = std::ranges::max(error) / largest + 4 * kRounding;
    const double product_error = scale_error + static_cast<double>(blocks + 4) * kRounding;
    for (size_t i = 0; i < 32; ++i) {
      const double position = x[i] / largest * 127;
      const double code = std::nearbyint(position);
      // How far the position may be off, and by how many codes that brings it beyond the middle between two.
      const double off = 127 * (error[i] / largest + scale_error);
      const double codes = std::ceil(std::max(0.0, off - (0.5 - std::fabs(position - code))));
      for (size_t n = 0; n < weight.outputs; ++n) {
        const size_t column = block % blocks * 32 + i;
        const double unit = largest / 127;
        const size_t out = block / blocks * weight.outputs + n;
        product.exact[out] += code * unit * weight.at(n, column);
        product.bounds[out] += (codes + std::fabs(code) * product_error) * unit * weight.magnitude(n, column);
      }
    }
  }
  return product;
}

Product naive_norm(std::span<const double> x, std::span<const double> errors, const std::vector<float>& weight,
                   float epsilon) {
  double squares = 0;
  double wrong_squares = 0;
  for (const double value : x) squares += value * value;
  for (const double error : errors) wrong_squares += error * error;
  const auto size = static_cast<double>(x.size());
  const double inverse = 1 / std::sqrt(squares / size + double{epsilon});
  // The root mean square is off by no more than the errors' own, relative to it. It is a sum of as many squares.
  const double relative = std::sqrt(wrong_squares / size) * inverse;
  REQUIRE(relative < 0.5);
  const double inverse_error = relative / (1 - relative) + (size + 8) * kRounding;
  Product normed;
  for (size_t i = 0; i < x.size(); ++i) {
    const double scale = inverse * weight[i];
    normed.exact.push_back(x[i] * scale);
    normed.bounds.push_back(scale * (errors[i] + (std::fabs(x[i]) + errors[i]) * inverse_error));
  }
  return normed;
}

void naive_post_norm(Product& product, const std::vector<float>& weight, float epsilon, const float* residual) {
  const size_t outputs = weight.size();
  for (size_t first = 0; first < product.exact.size(); first += outputs) {
    const std::span<double> exact = std::span(product.exact).subspan(first, outputs);
    const std::span<double> bounds = std::span(product.bounds).subspan(first, outputs);
    const Product normed = naive_norm(exact, bounds, weight, epsilon);
    for (size_t n = 0; n < outputs; ++n) {
      exact[n] = normed.exact[n] + (residual == nullptr ? 0 : residual[first + n]);
      bounds[n] = normed.bounds[n] + 4 * kRounding * std::fabs(exact[n]);
    }
  }
}

}  // namespace meki::test
