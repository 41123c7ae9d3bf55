#pragma once

// Vectors of AVX2 with FMA and F16C (common.h says what they are). Products with the cache go through 16 bits:
// _mm256_maddubs_epi16 would saturate.

#include <immintrin.h>

#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace {

constexpr size_t kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

inline Floats load(const float* at) { return _mm256_loadu_ps(at); }
inline Floats load(const uint16_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
inline void store(float* at, Floats x) { _mm256_storeu_ps(at, x); }
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return max(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }
inline Floats negative_magnitude(Floats x) { return _mm256_or_ps(_mm256_set1_ps(-0.0F), x); }
inline Floats round_even(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Ints round(Floats x) { return _mm256_cvtps_epi32(x); }
inline Ints round_level(Floats x) { return round(max(x, broadcast(-127))); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats only_nan(Floats x) { return _mm256_and_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), x); }
inline Floats where_negative(Floats x, Floats a, Floats b) { return _mm256_blendv_ps(b, a, x); }

inline Floats times_power(Floats x, Floats n) {
  // In two factors that are normal numbers.
  const __m256i whole = round(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return mul(mul(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

template <size_t kDistance>
Floats exchange(Floats x) {
  if constexpr (kDistance == 1) return _mm256_permute_ps(x, 0xB1);
  if constexpr (kDistance == 2) return _mm256_permute_ps(x, 0x4E);
  if constexpr (kDistance == 4) return _mm256_permute2f128_ps(x, x, 1);
}

inline float first_of(Floats x) { return _mm256_cvtss_f32(x); }
inline float sum_of(Floats v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline int32_t sum_of(Ints v) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}

inline float largest_of(Floats v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
template <int N>
float largest_or_nan(const Floats (&x)[N]) {
  __m256 most = _mm256_setzero_ps();
  __m256 poison = _mm256_setzero_ps();  // max is no home for a NaN, and x * 0 is one for infinity, too
  for (const Floats& vector : x) {
    most = max(most, vector);
    poison = fma(vector, _mm256_setzero_ps(), poison);
  }
  return largest_of(most) + sum_of(poison);
}

inline void store_codes(const Ints (&x)[4], int8_t* out) {
  // Packing works on halves of a register: the order is restored at the end.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), ordered);
}

// What the registers hold: half of them are sums.
template <int Q>
constexpr int kFloatVectors = 8 / Q;
template <int Q>
constexpr int kInt8ScoreVectors = 8 / Q;
template <int Q>
constexpr int kInt8ValueVectors = 8 / Q;
template <int Q>
constexpr int kInt4ScoreVectors = 4 / Q;  // there are as many totals
constexpr int kInt8ValueQueries = 4;
constexpr int kNibbleVectors = 1;
constexpr int kPanelVectors = 2;
constexpr int kPanelTokens = 4;

inline __m256i load_bytes(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline __m256i broadcast4(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return _mm256_set1_epi32(word);
}

constexpr size_t kDepth = 4;
using Bytes = __m256i;
// The 4 bytes of every 32-bit lane as 16-bit numbers, two lanes' worth: bytes 0 and 2, then bytes 1 and 3.
struct Code {
  __m256i even;
  __m256i odd;
};
inline Bytes load_rows(const std::byte* at, size_t) { return load_bytes(at); }
template <int>
Code unpack(Bytes bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Code low_nibbles(Bytes bytes) {
  const __m256i mask = _mm256_set1_epi16(15);
  return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 8), mask)};
}
inline Code high_nibbles(Bytes bytes) {
  return {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(15)), _mm256_srli_epi16(bytes, 12)};
}

// sum + what 4 bytes times 4 numbers, as store_paired has them, are in every lane.
inline Ints add_pair_products(Ints sum, const Code& code, Ints even, Ints odd) {
  return add(add(sum, _mm256_madd_epi16(code.even, even)), _mm256_madd_epi16(code.odd, odd));
}
// Stores 16 numbers so that each 4 of them are numbers 0 and 2, then 1 and 3: what Code is multiplied by.
inline void store_paired(__m256i numbers, int16_t* out) {
  constexpr int kOrder = 0xD8;  // 0, 2, 1, 3
  const __m256i paired = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(numbers, kOrder), kOrder);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), paired);
}
// 16 bytes as 16-bit numbers.
inline __m256i load_wide(const int8_t* at) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

struct QueryNumbers {
  static constexpr int kByteOffset = 0;
  int16_t paired[KvLayout::kMaxHeadDim];

  void set(const Queries& queries, size_t query) {
    for (size_t e = 0; e < queries.head_dim; e += 16) {
      store_paired(load_wide(queries.codes + query * queries.head_dim + e), paired + e);
    }
  }
};

struct WeightNumbers {
  static constexpr int kByteOffset = 0;
  int16_t paired[KvLayout::kBlock];
  int32_t sum;
  float unit;

  void set(const Ints (&rounded)[8]) {
    __m256i sums = _mm256_setzero_si256();
    for (int v = 0; v < 8; v += 2) {
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded[v], rounded[v + 1]), 0xD8);
      const __m256i code = _mm256_max_epi16(_mm256_min_epi16(both, _mm256_set1_epi16(255)), _mm256_setzero_si256());
      sums = add(sums, _mm256_madd_epi16(code, _mm256_set1_epi16(1)));
      store_paired(code, paired + 8 * v);
    }
    sum = sum_of(sums);
  }
};

template <int Q, int V>
struct Sums {
  Ints sum[Q][V];

  void start(int q, int32_t initial, int first = 0, int count = V) {
    for (int v = first; v < first + count; ++v) sum[q][v] = _mm256_set1_epi32(initial);
  }
  template <int N, class Numbers>
  void add(int q, int v, const Code (&code)[N], const Numbers& numbers, size_t k) {
    const Ints even = broadcast4(numbers.paired + k);
    const Ints odd = broadcast4(numbers.paired + k + 2);
    for (int i = 0; i < N; ++i) sum[q][v + i] = add_pair_products(sum[q][v + i], code[i], even, odd);
  }
  Ints get(int q, int v) const { return sum[q][v]; }
};

template <WeightType kType, int T, int G>
void block_products(const std::byte* codes, const int8_t* const (&xs)[T], const int32_t* const (&excess)[T],
                    Ints (&out)[T][2][G]) {
  if constexpr (weight_bits(kType) == 4) {
    // Nibbles, 0 to 15, times inputs in 8 bits: eight pairs of products fit into 16 bits.
    const __m256i mask = _mm256_set1_epi8(15);
    Ints sum[T][2] = {};
    const auto add_columns = [&](int i) {  // 4i .. 4i + 3, and 16 after them
      __m256i low[2];
      __m256i high[2];
      for (int h = 0; h < 2; ++h) {
        const __m256i bytes = load_bytes(codes + 64 * i + 32 * h);
        low[h] = _mm256_and_si256(bytes, mask);
        high[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
      }
      for (int t = 0; t < T; ++t) {
        const __m256i first = broadcast4(xs[t] + 4 * i);
        const __m256i second = broadcast4(xs[t] + 16 + 4 * i);
        for (int h = 0; h < 2; ++h) {
          sum[t][h] = _mm256_add_epi16(sum[t][h], _mm256_maddubs_epi16(low[h], first));
          sum[t][h] = _mm256_add_epi16(sum[t][h], _mm256_maddubs_epi16(high[h], second));
        }
      }
    };
    if constexpr (T == 1) {
      for (int i = 0; i < 4; ++i) add_columns(i);
    } else {
#pragma GCC unroll 1  // unrolled, GCC moves additions around until it spills
      for (int i = 0; i < 4; ++i) add_columns(i);
    }
    for (int t = 0; t < T; ++t) {
      for (int h = 0; h < 2; ++h) {
        const __m256i wide = _mm256_madd_epi16(sum[t][h], _mm256_set1_epi16(1));
        out[t][h][0] = code_offset(kType) == 0 ? wide : add(wide, _mm256_set1_epi32(*excess[t]));
      }
    }
  } else {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));  // codes are the value + 128
    int16_t paired[T][32];
    for (int t = 0; t < T; ++t) {
      for (int i = 0; i < 32; i += 16) store_paired(load_wide(xs[t] + i), paired[t] + i);
    }
    for (int g = 0; g < G; ++g) {
      Ints sum[T][2] = {};
#pragma GCC unroll 1  // as above
      for (int i = 8 / G * g; i < 8 / G * (g + 1); ++i) {
        Code rows[2];
        for (int h = 0; h < 2; ++h) rows[h] = unpack<0>(_mm256_xor_si256(load_bytes(codes + 64 * i + 32 * h), sign));
        for (int t = 0; t < T; ++t) {
          const __m256i even = broadcast4(paired[t] + 4 * i);
          const __m256i odd = broadcast4(paired[t] + 4 * i + 2);
          for (int h = 0; h < 2; ++h) sum[t][h] = add_pair_products(sum[t][h], rows[h], even, odd);
        }
      }
      for (int t = 0; t < T; ++t) {
        for (int h = 0; h < 2; ++h) out[t][h][g] = sum[t][h];
      }
    }
  }
}

}  // namespace
}  // namespace meki
