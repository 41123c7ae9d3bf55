#pragma once

// What the algorithms over vectors share. They stand once, in attention.h and linear.h, and are compiled once an
// instruction set: AVX2.cc and its like include the vectors of one instruction set (avx2.h), then the algorithms.
// Everything is in an anonymous namespace, and nothing of the standard library is instantiated: what is compiled with
// more than the baseline's instructions must not be merged by the linker with another file's copy of the same function.
// tests/cpp/kernels/symbols.sh checks that.
//
// The vectors of an instruction set are
//
//   kLanes, Floats, Ints   elements of a vector; vectors of float and of int32_t
//   load, store            kLanes floats; load also takes halves
//   broadcast              one float in every lane
//   add, sub, mul, div, fma (a * b + c), fnma (c - a * b)
//   max, larger            max keeps a NaN of its second operand; larger may pass over a NaN
//   magnitude, negative_magnitude, round_even (to float), round (to int, ties to even; NaN becomes any integer)
//   times_power (x * 2^n), only_nan (what is no NaN becomes 0), where_negative(x, a, b) (x < 0 ? a : b)
//   to_floats, first_of (lane 0), sum_of, largest_of (all lanes; may pass over a NaN)
//   largest_or_nan         of an array of vectors of numbers >= 0; a NaN of one is the result, also for infinity on x86
//   store_codes            32 integers as bytes
//   kPrefetch              the cache to prefetch into: 3 is the nearest
//
// and what they know of products of integers, with what the registers hold:
//
//   Bytes, Code            kDepth / 4 rows of bytes as loaded (load_rows), and as multiplied (low_nibbles,
//   high_nibbles) QueryNumbers, WeightNumbers   what Code is multiplied by: 15 and 14 bits; unpack turns Bytes into
//   Code, which is
//                                 the int8 + kByteOffset then
//   Sums<Q, V>             int32 sums of products: start, add, get
//   block_products         of one block of a panel
//   kFloatVectors, kInt8Vectors, kInt4ScoreVectors<Q>, kInt8ValueQueries, kNibbleVectors, kPanelVectors, kPanelTokens

#include <cstddef>

namespace meki {
namespace {

// The lines of the next `bytes` bytes.
inline void prefetch(const std::byte* at, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, kPrefetch);
}

// As in rounding.h, which must not be included here.
inline float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

// e^x for x <= 0; 0 for -inf: 2^n times a minimax polynomial of degree 6, fitted to e^r for |r| <= ln(2) / 2, with r
// found as Cephes does. Within 1 ulp.
inline Floats exp_negative(Floats x) {
  x = max(broadcast(-104), x);  // e^-104 rounds to 0; a NaN stays one
  const Floats n = round_even(mul(x, broadcast(1.44269504F)));
  Floats r = fnma(n, broadcast(0.693359375F), x);
  r = fnma(n, broadcast(-2.12194440e-4F), r);
  constexpr float kCoefficients[] = {0.0083687808F, 0.041668393F, 0.16666520F, 0.49999994F, 1, 1};
  Floats p = broadcast(0.0013814467F);
  for (const float coefficient : kCoefficients) p = fma(p, r, broadcast(coefficient));
  return times_power(p, n);
}

}  // namespace
}  // namespace meki
