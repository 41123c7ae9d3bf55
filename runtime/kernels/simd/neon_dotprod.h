#pragma once

// NEON's products with the cache (common.h) by dot products: vdotq_s32 adds up 4 of them in every lane.

#include "runtime/kernels/simd/neon.h"

namespace meki {
namespace {

constexpr int kNibbleVectors = 8;
constexpr size_t kDepth = 4;
using Bytes = int8x16_t;
using Code = int8x16_t;
inline Bytes load_rows(const std::byte* at, size_t) { return load_bytes(at); }
template <int>
Code unpack(Bytes bytes) {
  return bytes;
}

template <int Q, int V>
struct Sums {
  Ints high[Q][V];
  Ints low[Q][V];

  void start(int q, int32_t initial) {
    for (int v = 0; v < V; ++v) {
      high[q][v] = vdupq_n_s32(0);
      low[q][v] = vdupq_n_s32(initial);
    }
  }
  template <int N, class Numbers>
  void add(int q, int v, const Code (&code)[N], const Numbers& numbers, size_t k) {
    const int8x16_t h = broadcast4(numbers.high + k);
    const int8x16_t l = broadcast4(numbers.low + k);
    for (int i = 0; i < N; ++i) {
      high[q][v + i] = vdotq_s32(high[q][v + i], code[i], h);
      low[q][v + i] = vdotq_s32(low[q][v + i], code[i], l);
    }
  }
  Ints get(int q, int v) const { return vaddq_s32(vshlq_n_s32(high[q][v], 7), low[q][v]); }
};

}  // namespace
}  // namespace meki
