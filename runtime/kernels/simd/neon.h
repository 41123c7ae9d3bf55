#pragma once

// Vectors of NEON with the dot products of ARMv8.2 (common.h says what they are), but for products with the cache:
// those are in neon_dotprod.h and neon_i8mm.h.

#include <arm_neon.h>

#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace {

constexpr size_t kLanes = 4;
using Floats = float32x4_t;
using Ints = int32x4_t;

inline Floats load(const float* at) { return vld1q_f32(at); }
inline Floats load(const uint16_t* at) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at))); }
inline void store(float* at, Floats x) { vst1q_f32(at, x); }
inline Floats broadcast(float x) { return vdupq_n_f32(x); }

inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats larger(Floats a, Floats b) { return vmaxnmq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
inline Floats magnitude(Floats x) { return vabsq_f32(x); }
inline Floats negative_magnitude(Floats x) { return vnegq_f32(vabsq_f32(x)); }
inline Floats round_even(Floats x) { return vrndnq_f32(x); }
inline Ints round(Floats x) { return vcvtnq_s32_f32(x); }
inline Ints round_level(Floats x) { return round(x); }
inline Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
inline Floats only_nan(Floats x) { return vbslq_f32(vceqq_f32(x, x), vdupq_n_f32(0), x); }
inline Floats where_negative(Floats x, Floats a, Floats b) { return vbslq_f32(vcltzq_f32(x), a, b); }

inline Floats times_power(Floats x, Floats n) {
  // In two factors that are normal numbers.
  const int32x4_t whole = vcvtq_s32_f32(n);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  return mul(mul(x, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}

inline float first_of(Floats x) { return vgetq_lane_f32(x, 0); }
inline float sum_of(Floats x) { return vaddvq_f32(x); }
inline int32_t sum_of(Ints x) { return vaddvq_s32(x); }

inline float largest_of(Floats x) { return vmaxnmvq_f32(x); }
template <int N>
float largest_or_nan(const Floats (&x)[N]) {
  float32x4_t most = x[0];
  for (const Floats& vector : x) most = max(most, vector);
  return vmaxvq_f32(most);
}

inline void store_codes(const Ints (&x)[8], int8_t* out) {
  for (int v = 0; v < 8; v += 2) {
    vst1_s8(out + 4 * v, vqmovn_s16(vcombine_s16(vqmovn_s32(x[v]), vqmovn_s32(x[v + 1]))));
  }
}

// What the registers hold.
template <int Q>
constexpr int kFloatVectors = 16 / Q;
template <int Q>
constexpr int kInt8Vectors = 8 / Q;
template <int Q>
constexpr int kInt4ScoreVectors = 8 / Q;
constexpr int kInt8ValueQueries = 4;
constexpr int kPanelVectors = 2;
constexpr int kPanelTokens = 4;
constexpr int kPrefetch = 3;

inline int8x16_t load_bytes(const std::byte* at) { return vld1q_s8(reinterpret_cast<const int8_t*>(at)); }
inline int8x16_t broadcast4(const int8_t* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}
inline int8x16_t low_nibbles(int8x16_t bytes) { return vandq_s8(bytes, vdupq_n_s8(15)); }
inline int8x16_t high_nibbles(int8x16_t bytes) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(bytes), 4));
}

// Numbers are 128 * high + low.
struct QueryNumbers {
  static constexpr int kByteOffset = 0;
  const int8_t* high;
  const int8_t* low;

  void set(const Queries& queries, size_t query) {
    high = queries.high + query * queries.head_dim;
    low = queries.low + query * queries.head_dim;
  }
};

struct WeightNumbers {
  static constexpr int kByteOffset = 0;
  int8_t high[KvLayout::kBlock];
  int8_t low[KvLayout::kBlock];
  int32_t sum;
  float unit;

  void set(const Ints (&rounded)[16]) {
    int32x4_t sums = vdupq_n_s32(0);
    for (int v = 0; v < 16; v += 2) {
      int32x4_t code[2];
      for (int i = 0; i < 2; ++i) {
        code[i] = vmaxq_s32(vminq_s32(rounded[v + i], vdupq_n_s32(16383)), vdupq_n_s32(0));
        sums = add(sums, code[i]);
      }
      const int16x8_t codes = vcombine_s16(vmovn_s32(code[0]), vmovn_s32(code[1]));
      vst1_s8(high + 4 * v, vshrn_n_s16(codes, 7));
      vst1_s8(low + 4 * v, vmovn_s16(vandq_s16(codes, vdupq_n_s16(127))));
    }
    sum = sum_of(sums);
  }
};

template <int kBits, int T, int G>
void block_products(const std::byte* codes, const int8_t* const (&xs)[T], const int32_t (&excess)[T][G],
                    Ints (&out)[T][2][G]) {
  // Of nibbles; bytes become signed by themselves.
  for (int t = 0; t < T; ++t) {
    for (int g = 0; g < G; ++g) out[t][0][g] = out[t][1][g] = vdupq_n_s32(kBits == 4 ? -excess[t][g] : 0);
  }
  for (int i = 0; i < kBits; ++i) {
    for (int v = 0; v < 2; ++v) {
      const int8x16_t bytes = load_bytes(codes + 64 * i + 16 * v);
      if constexpr (kBits == 4) {
        const int8x16_t low = low_nibbles(bytes);
        const int8x16_t high = high_nibbles(bytes);
        for (int t = 0; t < T; ++t) {
          out[t][v][0] = vdotq_s32(out[t][v][0], low, broadcast4(xs[t] + 4 * i));
          out[t][v][0] = vdotq_s32(out[t][v][0], high, broadcast4(xs[t] + 16 + 4 * i));
        }
      } else {
        const int8x16_t rows = veorq_s8(bytes, vdupq_n_s8(-128));  // code + 128 to code
        const int g = i * G / 8;
        for (int t = 0; t < T; ++t) out[t][v][g] = vdotq_s32(out[t][v][g], rows, broadcast4(xs[t] + 4 * i));
      }
    }
  }
}

}  // namespace
}  // namespace meki
