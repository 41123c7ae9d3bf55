#pragma once

// Linear layers over vectors (common.h): the members of Simd that make, round and multiply their inputs.

#include "runtime/kernels/simd/common.h"
#include "runtime/kernels/weight_type.h"

namespace meki {
namespace {

// out = gate * sigmoid(argument(gate)) * up.
template <class Argument>
void multiply_gated(const float* gate, const float* up, size_t count, float* out, Argument argument) {
  const Floats one = broadcast(1);
  for (size_t i = 0; i < count; i += kLanes) {
    const Floats x = load(gate + i);
    const Floats a = argument(x);
    const Floats e = exp_negative(negative_magnitude(a));
    // sigmoid(a): 1 / (1 + e) for a >= 0, e / (1 + e) otherwise, and nothing overflows.
    const Floats sigmoid = div(where_negative(a, e, one), add(one, e));
    store(out + i, mul(mul(x, sigmoid), load(up + i)));
  }
}

inline void swiglu(const float* gate, const float* up, size_t count, float* out) {
  multiply_gated(gate, up, count, out, [](Floats x) { return x; });
}

inline void geglu(const float* gate, const float* up, size_t count, float* out) {
  // (1 + tanh(a / 2)) / 2 is sigmoid(a); that of an infinite a is 0 or 1.
  multiply_gated(gate, up, count, out, [](Floats x) {
    constexpr float kSlope = 1.5957691216F;  // 2 sqrt(2 / pi)
    return mul(x, fma(mul(x, x), broadcast(kSlope * 0.044715F), broadcast(kSlope)));
  });
}

inline void quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* excess) {
  for (size_t b = 0; b < inputs / 32; ++b, x += 32, codes += 32) {
    const float largest = largest_of_32(x);
    Ints code[kVectors];
    round_32(x, broadcast(quantizer(127, largest)), code, codes);
    scales[b] = largest / 127;
    const Ints first = add_16(code, 0);
    excess[2 * b] = -8 * sum_of(add(first, add_16(code, 1)));
    excess[2 * b + 1] = -8 * sum_of(first);
  }
}

// T tokens against a panel.
template <WeightType kType, int T>
void panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kGroups = weight_groups(kType);
  constexpr int H = 16 / kLanes;
  const size_t blocks = x.inputs / 32;
  Floats total[T][H] = {};
  for (size_t b = 0; b < blocks; ++b, panel += block_bytes(kType)) {
    if constexpr (T == 1) fetch(panel, kFetchAhead, block_bytes(kType));  // decode: bound by memory
    const int8_t* xs[T];
    const int32_t* excess[T];
    float sum[T];
    for (int t = 0; t < T; ++t) {
      const size_t at = (first + t) * blocks + b;
      xs[t] = x.codes + 32 * at;
      excess[t] = x.excess + 2 * at;
      if constexpr (has_minimum(kType)) sum[t] = x.scales[at] * -0.125F * static_cast<float>(*excess[t]);
    }
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + code_bytes(kType));
    for (int h = 0; h < H; h += kPanelVectors) {
      Ints products[T][kPanelVectors][kGroups];
      block_products<kType>(panel + 4 * kLanes * h, xs, excess, products);
      for (int v = 0; v < kPanelVectors; ++v) {
        const uint16_t* const row = row_scales + kLanes * (h + v);
        for (int g = 0; g < kGroups; ++g) {
          const Floats row_scale = load(row + 16 * g);
          for (int t = 0; t < T; ++t) {
            const Floats scale = mul(row_scale, broadcast(x.scales[(first + t) * blocks + b]));
            total[t][h + v] = fma(to_floats(products[t][v][g]), scale, total[t][h + v]);
          }
        }
        if constexpr (has_minimum(kType)) {
          const Floats minimum = load(row + 16 * kGroups);
          for (int t = 0; t < T; ++t) total[t][h + v] = fma(minimum, broadcast(sum[t]), total[t][h + v]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int h = 0; h < H; ++h) store(out + (first + t) * stride + kLanes * h, total[t][h]);
  }
}

template <WeightType kType>
void panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  if constexpr (kPanelTokens == 8) {
    for (; t + 8 <= x.tokens; t += 8) panel_tokens<kType, 8>(panel, x, t, out, stride);
  }
  for (; t + 4 <= x.tokens; t += 4) panel_tokens<kType, 4>(panel, x, t, out, stride);
  for (; t < x.tokens; ++t) panel_tokens<kType, 1>(panel, x, t, out, stride);
}

}  // namespace
}  // namespace meki
