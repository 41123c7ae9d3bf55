#pragma once

// What the AVX-512 files share. They are compiled with AVX-512 F, BW, DQ, VL and VNNI enabled: nothing but intrinsics
// and what is local to the file may be instantiated in them, or another file's copy of a shared inline function could
// be replaced by one that not every CPU runs.

#include <immintrin.h>

#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace avx512 {

// Members of kAvx512Vnni that avx512_integer.cc defines.
void scores_int8(const Queries& queries, const std::byte* block, const std::byte* next, float* scores);
void scores_int4(const Queries& queries, const std::byte* block, const std::byte* next, float* scores);
void values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                 float* outputs);
void values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                 float* outputs);

}  // namespace avx512

namespace {

constexpr size_t kBlock = KvLayout::kBlock;

inline __m512i load(const void* at) { return _mm512_loadu_si512(at); }
inline __m512 halves(const void* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at))); }
// Into the second-level cache: the first has too few outstanding misses to stream from memory with.
inline void prefetch(const std::byte* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// As in rounding.h, which must not be included here.
inline float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

// 4 neighbouring bytes in every lane.
inline __m512i broadcast4(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Calls tile.template run<Q>(first) for queries first .. first + Q - 1, kLargest at a time.
template <int kLargest, class Tile>
void for_queries(size_t count, Tile tile) {
  size_t q = 0;
  for (; q + kLargest <= count; q += kLargest) tile.template run<kLargest>(q);
  if constexpr (kLargest > 2) {
    for (; q + 2 <= count; q += 2) tile.template run<2>(q);
  }
  for (; q < count; ++q) tile.template run<1>(q);
}

}  // namespace
}  // namespace meki
