#pragma once

// What the algorithms over vectors share. They stand once, in attention.h and linear.h, and are compiled once an
// instruction set: avx2.cc includes that set's vectors (avx2.h), then the algorithms, and so do its siblings. All of it
// is in an anonymous namespace, and nothing of the standard library is instantiated: what is compiled with more than
// the baseline's instructions must not be merged by the linker with another file's copy of the same function
// (tests/cpp/kernels/symbols.sh checks it).
//
// An instruction set has vectors of kLanes elements, Floats and Ints (int32_t), with
//
//   load, store       kLanes floats; load also takes halves. broadcast: one float in every lane
//   add, sub, mul, div, fma (a * b + c), fnma (c - a * b), times_power (x * 2^n)
//   max, larger       max keeps a NaN of its second operand, larger may pass over a NaN
//   magnitude, negative_magnitude, only_nan (0 for what is no NaN), where_negative(x, a, b) (x < 0 ? a : b)
//   round_even        to an integer as a float, ties to even
//   round, round_level, to_floats   to Ints and back. NaN becomes any integer; of round_level, one of -127 .. 127
//   exchange<n>(x)    every lane's neighbour n lanes away: lane i gets lane i ^ n, n a power of two
//   first_of, sum_of, largest_of    of the lanes; largest_of may pass over a NaN
//   largest_or_nan    of an array of vectors of numbers >= 0; NaN if one of them is. store_codes: 32 Ints as bytes
//
// and, for products of bytes, which differ most,
//
//   Bytes, Code       kDepth bytes of every column, as loaded by load_rows, and as multiplied: unpack (of int8),
//                     low_nibbles and high_nibbles (0 .. 15)
//   QueryNumbers, WeightNumbers     what Code is multiplied by: a query's signed bytes, 64 weights' unsigned ones.
//                                   `unpack` turns bytes into the code + kByteOffset of the numbers that it is for
//   Sums<Q, V>        int32 sums of Q rows of numbers times V vectors of columns: start, add, get
//   block_products    of one block of a panel with T tokens, without the excess that the offset of its codes brings:
//                     int32 [T][kPanelVectors][groups of inputs with a scale of their own]
//   k...Vectors, k...Queries, k...Tokens   what the registers hold at a time, of queries, tokens and vectors

#include <cstddef>

namespace meki {
namespace {

// Asks for the `bytes` bytes that stand `ahead` bytes behind `at`, into the second-level cache: the first has too few
// outstanding misses to stream from memory with. GCC removes calls of a function that does nothing but prefetch, as if
// it had no effect (seen with 12); inlined at once it is no such function.
[[gnu::always_inline]] inline void fetch(const void* at, size_t ahead, size_t bytes) {
  if (ahead == 0) return;
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(at) + ahead + line, 0, 2);
}

// As in rounding.h, which must not be included here.
inline float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

constexpr int kVectors = 32 / kLanes;  // of 32 numbers

// Of 32 numbers: the largest magnitude (NaN if one is NaN or infinite), and codes of -127 .. 127, as Ints and as bytes.
inline float largest_of_32(const float* x) {
  Floats magnitudes[kVectors];
  for (int v = 0; v < kVectors; ++v) magnitudes[v] = magnitude(load(x + kLanes * v));
  return largest_or_nan(magnitudes);
}
inline void round_32(const float* x, Floats inverse, Ints (&code)[kVectors], int8_t* codes) {
  for (int v = 0; v < kVectors; ++v) code[v] = round_level(mul(load(x + kLanes * v), inverse));
  store_codes(code, codes);
}

// Of the first 16 of them, or of the others.
inline Ints add_16(const Ints (&code)[kVectors], int half) {
  constexpr int N = kVectors / 2;
  Ints sum = code[half * N];
  for (int v = 1; v < N; ++v) sum = add(sum, code[half * N + v]);
  return sum;
}

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
