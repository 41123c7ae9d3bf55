#pragma once

// Linear layers over vectors (common.h): the members of Simd that make, round and multiply their inputs.

#include "runtime/kernels/simd/common.h"

namespace meki {
namespace {

inline void swiglu(const float* gate, const float* up, size_t count, float* out) {
  const Floats one = broadcast(1);
  for (size_t i = 0; i < count; i += kLanes) {
    const Floats x = load(gate + i);
    const Floats e = exp_negative(negative_magnitude(x));
    // sigmoid(x): 1 / (1 + e) for x >= 0, e / (1 + e) otherwise, and nothing overflows.
    const Floats sigmoid = div(where_negative(x, e, one), add(one, e));
    store(out + i, mul(mul(x, sigmoid), load(up + i)));
  }
}

inline void quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* sums) {
  constexpr int N = 32 / kLanes;
  for (size_t b = 0; b < inputs / 32; ++b, x += 32, codes += 32) {
    Floats magnitudes[N];
    for (int v = 0; v < N; ++v) magnitudes[v] = magnitude(load(x + kLanes * v));
    const float largest = largest_or_nan(magnitudes);
    const Floats inverse = broadcast(quantizer(127, largest));
    Ints code[N];
    for (int v = 0; v < N; ++v) code[v] = round_level(mul(load(x + kLanes * v), inverse));
    Ints sum = code[0];
    for (int v = 1; v < N; ++v) sum = add(sum, code[v]);
    store_codes(code, codes);
    scales[b] = largest / 127;
    sums[b] = sum_of(sum);
  }
}

// T tokens against a panel.
template <int kBits, int T>
void panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kCodes = 64 * kBits;
  constexpr int H = 16 / kLanes;
  const size_t blocks = x.inputs / 32;
  Floats total[T][H] = {};
  for (size_t b = 0; b < blocks; ++b, panel += kCodes + 32) {
    if constexpr (T == 1) prefetch(panel + 4096, kCodes + 32);  // decode: bound by memory
    const int8_t* xs[T];
    int32_t sums[T];
    for (int t = 0; t < T; ++t) {
      xs[t] = x.codes + (first + t) * x.inputs + 32 * b;
      sums[t] = x.sums[(first + t) * blocks + b];
    }
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + kCodes);
    for (int h = 0; h < H; h += kPanelVectors) {
      Ints products[T][kPanelVectors];
      block_products<kBits>(panel + 4 * kLanes * h, xs, sums, products);
      for (int v = 0; v < kPanelVectors; ++v) {
        const Floats row_scale = load(row_scales + kLanes * (h + v));
        for (int t = 0; t < T; ++t) {
          const Floats scale = mul(row_scale, broadcast(x.scales[(first + t) * blocks + b]));
          total[t][h + v] = fma(to_floats(products[t][v]), scale, total[t][h + v]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int h = 0; h < H; ++h) store(out + (first + t) * stride + kLanes * h, total[t][h]);
  }
}

template <int kBits>
void panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  if constexpr (kPanelTokens == 8) {
    for (; t + 8 <= x.tokens; t += 8) panel_tokens<kBits, 8>(panel, x, t, out, stride);
  }
  for (; t + 4 <= x.tokens; t += 4) panel_tokens<kBits, 4>(panel, x, t, out, stride);
  for (; t < x.tokens; ++t) panel_tokens<kBits, 1>(panel, x, t, out, stride);
}

}  // namespace
}  // namespace meki
