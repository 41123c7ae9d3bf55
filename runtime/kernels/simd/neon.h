#pragma once

// Vectors of NEON with the dot products of ARMv8.2 (common.h says what they are), which add up 4 products of bytes in
// every lane: vdotq_s32 of signed ones, vdotq_u32 of unsigned ones.

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

template <size_t kDistance>
Floats exchange(Floats x) {
  if constexpr (kDistance == 1) return vrev64q_f32(x);
  if constexpr (kDistance == 2) return vextq_f32(x, x, 2);
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
constexpr int kInt8ScoreVectors = 16 / Q;
template <int Q>
constexpr int kInt8ValueVectors = 16 / Q;
template <int Q>
constexpr int kInt4ScoreVectors = 8 / Q;
constexpr int kInt8ValueQueries = 4;
constexpr int kPanelVectors = 2;
constexpr int kPanelTokens = 4;
constexpr int kNibbleVectors = 8;

inline int8x16_t load_bytes(const std::byte* at) { return vld1q_s8(reinterpret_cast<const int8_t*>(at)); }
inline int8x16_t broadcast4(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

constexpr size_t kDepth = 4;
using Bytes = int8x16_t;
using Code = int8x16_t;
inline Bytes load_rows(const std::byte* at, size_t) { return load_bytes(at); }
template <int kOffset>
Code unpack(Bytes bytes) {
  return kOffset == 0 ? bytes : veorq_s8(bytes, vdupq_n_s8(-128));
}
inline int8x16_t low_nibbles(int8x16_t bytes) { return vandq_s8(bytes, vdupq_n_s8(15)); }
inline int8x16_t high_nibbles(int8x16_t bytes) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(bytes), 4));
}

struct QueryNumbers {
  static constexpr int kByteOffset = 0;  // signed by signed
  const int8_t* codes;

  void set(const Queries& queries, size_t query) { codes = queries.codes + query * queries.head_dim; }
};

struct WeightNumbers {
  static constexpr int kByteOffset = 128;  // unsigned by unsigned
  uint8_t codes[KvLayout::kBlock];
  int32_t sum;
  float unit;

  void set(const Ints (&rounded)[16]) {
    int32x4_t sums = vdupq_n_s32(0);
    for (int v = 0; v < 16; v += 2) {
      int32x4_t code[2];
      for (int i = 0; i < 2; ++i) {
        code[i] = vmaxq_s32(vminq_s32(rounded[v + i], vdupq_n_s32(255)), vdupq_n_s32(0));
        sums = add(sums, code[i]);
      }
      const int16x8_t both = vcombine_s16(vmovn_s32(code[0]), vmovn_s32(code[1]));
      vst1_u8(codes + 4 * v, vmovn_u16(vreinterpretq_u16_s16(both)));
    }
    sum = sum_of(sums);
  }
};

template <int Q, int V>
struct Sums {
  Ints sum[Q][V];

  void start(int q, int32_t initial, int first = 0, int count = V) {
    for (int v = first; v < first + count; ++v) sum[q][v] = vdupq_n_s32(initial);
  }
  // Inlined early: GCC takes those of several Q, whose code is the same, for one, and then warns of its bounds.
  template <int N, class Numbers>
  [[gnu::always_inline]] void add(int q, int v, const Code (&code)[N], const Numbers& numbers, size_t k) {
    const int8x16_t number = broadcast4(numbers.codes + k);
    for (int i = 0; i < N; ++i) {
      Ints& its = sum[q][v + i];
      if constexpr (Numbers::kByteOffset == 0) {
        its = vdotq_s32(its, code[i], number);
      } else {
        its = vreinterpretq_s32_u32(
            vdotq_u32(vreinterpretq_u32_s32(its), vreinterpretq_u8_s8(code[i]), vreinterpretq_u8_s8(number)));
      }
    }
  }
  Ints get(int q, int v) const { return sum[q][v]; }
};

template <WeightType kType, int T, int G>
void block_products(const std::byte* codes, const int8_t* const (&xs)[T], const int32_t* const (&excess)[T],
                    Ints (&out)[T][2][G]) {
  constexpr int kBits = weight_bits(kType);
  // Of nibbles; bytes become signed by themselves.
  for (int t = 0; t < T; ++t) {
    for (int g = 0; g < G; ++g) out[t][0][g] = out[t][1][g] = vdupq_n_s32(code_offset(kType) == 8 ? *excess[t] : 0);
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
