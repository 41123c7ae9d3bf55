#pragma once

// NEON's products with the cache (common.h) by the 8-bit matrix products of ARMv8.6 (i8mm): vmmlaq_s32 multiplies 2
// rows of 8 bytes by 2 rows of 8 bytes, twice what a dot product does.

#include "runtime/kernels/simd/neon.h"

namespace meki {
namespace {

constexpr int kNibbleVectors = 1;
constexpr size_t kDepth = 8;

// Two vectors of 4 rows x 4 columns, side by side.
struct Bytes {
  int8x16_t left;
  int8x16_t right;
};
// The same as operands of 2 rows x 8 columns: rows 0 and 1, rows 2 and 3.
struct Code {
  int8x16_t pair[2];
};
inline Bytes load_rows(const std::byte* at, size_t row_bytes) { return {load_bytes(at), load_bytes(at + row_bytes)}; }
template <int>
Code unpack(const Bytes& bytes) {
  const int32x4_t a = vreinterpretq_s32_s8(bytes.left);
  const int32x4_t b = vreinterpretq_s32_s8(bytes.right);
  return {{vreinterpretq_s8_s32(vzip1q_s32(a, b)), vreinterpretq_s8_s32(vzip2q_s32(a, b))}};
}
inline Code low_nibbles(const Bytes& bytes) { return unpack<0>({low_nibbles(bytes.left), low_nibbles(bytes.right)}); }
inline Code high_nibbles(const Bytes& bytes) {
  return unpack<0>({high_nibbles(bytes.left), high_nibbles(bytes.right)});
}

// The rows of one operand are two columns of the cache, those of the other the high and the low parts of numbers.
template <int Q, int V>
struct Sums {
  Ints sum[Q][V][2];  // of each pair of columns: high and low of one, high and low of the other

  void start(int q, int32_t initial) {
    const int32x4_t both = vzip1q_s32(vdupq_n_s32(0), vdupq_n_s32(initial));
    for (auto& pair : sum[q]) pair[0] = pair[1] = both;
  }
  template <int N, class Numbers>
  void add(int q, int v, const Code (&code)[N], const Numbers& numbers, size_t k) {
    const int8x16_t number = vcombine_s8(vld1_s8(numbers.high + k), vld1_s8(numbers.low + k));
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 2; ++i) sum[q][v + n][i] = vmmlaq_s32(sum[q][v + n][i], code[n].pair[i], number);
    }
  }
  Ints get(int q, int v) const {
    const int32x4_t high = vuzp1q_s32(sum[q][v][0], sum[q][v][1]);
    const int32x4_t low = vuzp2q_s32(sum[q][v][0], sum[q][v][1]);
    return vaddq_s32(vshlq_n_s32(high, 7), low);
  }
};

}  // namespace
}  // namespace meki
