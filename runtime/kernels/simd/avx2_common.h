#pragma once

// What the AVX2 files share. All of it is local to the file that includes it: compiled with AVX2 enabled, it must not
// be merged with anybody else's copy.

#include <immintrin.h>

#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace avx2 {

// Members of kAvx2 that avx2_integer.cc defines.
void scores_int8(const Queries& queries, const std::byte* block, const std::byte* next, float* scores);
void scores_int4(const Queries& queries, const std::byte* block, const std::byte* next, float* scores);
void values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                 float* outputs);
void values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                 float* outputs);
void panel4(const std::byte* panel, const Activations& x, float* out, size_t stride);
void panel8(const std::byte* panel, const Activations& x, float* out, size_t stride);

}  // namespace avx2

namespace {

constexpr size_t kBlock = KvLayout::kBlock;

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline __m256 load_floats(const float* at) { return _mm256_loadu_ps(at); }
inline __m256 load_floats(const uint16_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// The lines of the next `bytes` bytes, into the second-level cache: the first has too few outstanding misses to stream
// from memory with.
inline void prefetch(const std::byte* at, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(at + line), _MM_HINT_T1);
}

inline float largest_of(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline float sum_of(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline int32_t sum_of(__m256i v) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}

// As in rounding.h.
inline float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

// Calls tile.template run<Q>(first) for queries first .. first + Q - 1. A tile of Q queries and kVectors<Q> vectors
// has eight sums: half of the registers.
template <class Tile>
void for_queries(size_t count, Tile tile) {
  size_t q = 0;
  for (; q + 4 <= count; q += 4) tile.template run<4>(q);
  for (; q + 2 <= count; q += 2) tile.template run<2>(q);
  for (; q < count; ++q) tile.template run<1>(q);
}
template <int Q>
constexpr int kVectors = 8 / Q;

}  // namespace
}  // namespace meki
