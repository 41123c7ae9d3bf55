// runtime/kernels/convolution against its formula (docs/package-format.md, "ShortConvolution") in double precision.

#include "runtime/kernels/convolution.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "tests/cpp/allocations.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::Bytes;
using test::Errors;
using test::kKvTypes;
using test::kRounding;
using test::Random;
using test::Threads;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::byte kGarbage{0xFF};  // all bytes: NaN, as float32 and as float16
constexpr float kEpsilon = 1e-5F;

// A sequence whose first `past` tokens have been seen, and the step behind them.
struct Sequence {
  size_t tokens;
  size_t past;
  size_t channels;
  size_t kernel;
  size_t dilation;
  KvType kv_type;
  std::vector<float> x;
  std::vector<float> norm_weight;
  std::vector<float> weight;
  Bytes cache;  // with room behind the sequence, in which there is garbage

  Sequence(size_t tokens_, size_t past_, size_t channels_, size_t kernel_, size_t dilation_, KvType type,
           Random& random)
      : tokens(tokens_),
        past(past_),
        channels(channels_),
        kernel(kernel_),
        dilation(dilation_),
        kv_type(type),
        x(random.floats(tokens * channels, -2, 2)),
        norm_weight(random.floats(channels, 0.5F, 1.5F)),
        weight(random.floats(kernel * channels, -1, 1)),
        cache((past + tokens + 3) * channels * element_bytes(), kGarbage) {
    for (size_t i = 0; i < past * channels; ++i) {
      const float value = random.uniform(-3, 3);
      const uint16_t half = test::naive_to_half(value);
      if (type == KvType::float32) std::memcpy(&cache[i * sizeof(value)], &value, sizeof(value));
      if (type != KvType::float32) std::memcpy(&cache[i * sizeof(half)], &half, sizeof(half));
    }
  }

  size_t element_bytes() const { return kv_type == KvType::float32 ? 4 : 2; }

  float seen(size_t position, size_t channel) const {
    const std::byte* const at = cache.data() + (position * channels + channel) * element_bytes();
    float value = 0;
    uint16_t half = 0;
    if (kv_type == KvType::float32) std::memcpy(&value, at, sizeof(value));
    if (kv_type != KvType::float32) std::memcpy(&half, at, sizeof(half));
    return kv_type == KvType::float32 ? value : test::naive_half(half);
  }

  // Of the step's tokens from `first` on; what is before them has been computed.
  ConvolutionArgs args(size_t first, size_t count, std::vector<float>& out) {
    return {count,
            past + first,
            channels,
            kernel,
            dilation,
            x.data() + first * channels,
            norm_weight.data(),
            kEpsilon,
            weight.data(),
            kv_type,
            cache.data(),
            out.data() + first * channels};
  }

  std::vector<float> run(const Parallel& parallel = {}) {
    std::vector<float> out(tokens * channels, kNaN);
    convolve(args(0, tokens, out), parallel);
    return out;
  }
};

struct Value {
  double exact = 0;
  double bound = 0;  // of what rounding may change of it
};

// n of one token and channel.
Value naive_norm(const Sequence& in, size_t position, size_t channel) {
  if (position < in.past) return {in.seen(position, channel), 0};
  const float* const row = in.x.data() + (position - in.past) * in.channels;
  double squares = 0;
  for (size_t i = 0; i < in.channels; ++i) squares += double{row[i]} * row[i];
  const double scale = in.norm_weight[channel] / std::sqrt(squares / static_cast<double>(in.channels) + kEpsilon);
  const double value = row[channel] * scale;
  // A sum of as many squares and a few operations; in halves 11 significant bits and a least step of 2^-24, too.
  double bound = std::fabs(value) * (static_cast<double>(in.channels) + 8) * kRounding;
  if (in.kv_type != KvType::float32) bound += std::fabs(value) * 0x1p-11 + 0x1p-25;
  return {value, bound};
}

Value naive_output(const Sequence& in, size_t token, size_t channel) {
  Value sum;
  double size = 0;
  for (size_t tap = 0; tap < in.kernel; ++tap) {
    const size_t back = (in.kernel - 1 - tap) * in.dilation;
    if (back > in.past + token) continue;  // before the sequence
    const Value n = naive_norm(in, in.past + token - back, channel);
    const double weight = in.weight[tap * in.channels + channel];
    sum.exact += weight * n.exact;
    sum.bound += std::fabs(weight) * n.bound;
    size += std::fabs(weight) * (std::fabs(n.exact) + n.bound);
  }
  sum.bound += size * static_cast<double>(in.kernel + 1) * kRounding;
  // SiLU's slope is below 1.1. It is an exponential and a few operations on it; one more rounding adds x.
  const double silu = sum.exact / (1 + std::exp(-sum.exact));
  const double x = in.x[token * in.channels + channel];
  return {x + silu, 1.1 * sum.bound + (8 * std::fabs(silu) + std::fabs(x + silu)) * kRounding};
}

TEST_CASE("convolve: against the formula, whatever lies behind the sequence") {
  Random random(41);
  for (size_t kernel = 1; kernel <= 5; ++kernel) {
    for (size_t dilation = 1; dilation <= 4; ++dilation) {
      for (const size_t past : {0, 1, 5, 23}) {
        for (const KvType type : kKvTypes) {
          const size_t tokens = std::vector<size_t>{1, 2, 9, 30}[random.below(4)];
          const size_t channels = std::vector<size_t>{1, 3, 8, 17, 37, 64}[random.below(6)];
          CAPTURE(kernel);
          CAPTURE(dilation);
          CAPTURE(past);
          CAPTURE(tokens);
          CAPTURE(channels);
          CAPTURE(static_cast<int>(type));
          Sequence in(tokens, past, channels, kernel, dilation, type, random);
          if (tokens > 1) std::fill_n(in.x.begin(), channels, 0.0F);              // nothing but epsilon
          if (tokens > 2) std::fill_n(in.x.begin() + channels, channels, 1e-3F);  // where epsilon matters
          const Bytes before = in.cache;
          const std::vector<float> out = in.run();
          Errors errors;
          for (size_t t = 0; t < tokens; ++t) {
            for (size_t i = 0; i < channels; ++i) {
              const Value expected = naive_output(in, t, i);
              errors.add(out[t * channels + i], expected.exact, expected.bound);
              const Value kept = naive_norm(in, past + t, i);
              errors.add(in.seen(past + t, i), kept.exact, kept.bound);
            }
          }
          CHECK(errors.worst() <= 1);
          const auto seen = static_cast<std::ptrdiff_t>(past * channels * in.element_bytes());
          CHECK(std::equal(before.begin(), before.begin() + seen, in.cache.begin()));
          const auto end = static_cast<std::ptrdiff_t>((past + tokens) * channels * in.element_bytes());
          CHECK(std::all_of(in.cache.begin() + end, in.cache.end(), [](std::byte b) { return b == kGarbage; }));
        }
      }
    }
  }
}

TEST_CASE("convolve: however a sequence is cut into steps, and on however many threads, to the bit") {
  Random random(42);
  for (const KvType type : kKvTypes) {
    for (const size_t channels : {5, 64}) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(channels);
      const Sequence sequence(61, 2, channels, 4, 3, type, random);
      Sequence whole = sequence;
      const std::vector<float> expected = whole.run();
      for (int round = 0; round < 12; ++round) {
        Sequence cut = sequence;
        Threads threads(round % 3 == 0 ? 1 : 4, round % 3 == 1);
        std::vector<float> out(expected.size(), kNaN);
        for (size_t done = 0; done < cut.tokens;) {
          const size_t most = round < 3 ? cut.tokens : 1 + random.below(20);
          const size_t count = std::min(cut.tokens - done, most);
          convolve(cut.args(done, count, out), threads.parallel());
          done += count;
        }
        CHECK(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)) == 0);
        CHECK(cut.cache == whole.cache);
      }
    }
  }
}

TEST_CASE("convolve: NaN in a token makes it NaN and those that look back at it, and no other's output") {
  Random random(43);
  constexpr size_t kToken = 4;
  for (const KvType type : kKvTypes) {
    Sequence in(20, 6, 17, 3, 4, type, random);
    in.x[kToken * in.channels + 7] = kNaN;
    const std::vector<float> out = in.run();
    bool as_expected = true;
    for (size_t t = 0; t < in.tokens; ++t) {
      const bool nan = t == kToken || t == kToken + 4 || t == kToken + 8;
      for (size_t i = 0; i < in.channels; ++i) {
        as_expected = as_expected && std::isnan(out[t * in.channels + i]) == nan;
      }
    }
    CHECK(as_expected);
  }
}

TEST_CASE("convolve: allocates nothing" * doctest::skip(!test::kCountsAllocations)) {
  Random random(44);
  Threads threads(4, true);
  for (const KvType type : kKvTypes) {
    Sequence in(20, 3, 64, 4, 3, type, random);
    std::vector<float> out(in.tokens * in.channels);
    const uint64_t before = test::allocations();
    convolve(in.args(0, 20, out), threads.parallel());
    convolve(in.args(19, 1, out), {});
    const uint64_t made = test::allocations() - before;
    CHECK(made == 0);
  }
}

}  // namespace
}  // namespace meki
