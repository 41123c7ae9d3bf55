#pragma once

// Vectors of AVX-512 F, BW, DQ, VL and VNNI (common.h says what they are). _mm512_dpbusd_epi32 adds up 4 products of
// unsigned by signed bytes in every lane.

#include <immintrin.h>

#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace {

constexpr size_t kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

inline Floats load(const float* at) { return _mm512_loadu_ps(at); }
inline Floats load(const uint16_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return max(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats magnitude(Floats x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0F), x); }
inline Floats negative_magnitude(Floats x) { return _mm512_or_ps(_mm512_set1_ps(-0.0F), x); }
inline Floats round_even(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Ints round(Floats x) { return _mm512_cvtps_epi32(x); }
inline Ints round_level(Floats x) { return round(max(x, broadcast(-127))); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline Floats only_nan(Floats x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x); }
inline Floats where_negative(Floats x, Floats a, Floats b) {
  return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a);
}

template <size_t kDistance>
Floats exchange(Floats x) {
  if constexpr (kDistance == 1) return _mm512_permute_ps(x, 0xB1);
  if constexpr (kDistance == 2) return _mm512_permute_ps(x, 0x4E);
  if constexpr (kDistance == 4) return _mm512_shuffle_f32x4(x, x, 0xB1);
  if constexpr (kDistance == 8) return _mm512_shuffle_f32x4(x, x, 0x4E);
}

inline float first_of(Floats x) { return _mm512_cvtss_f32(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x); }

inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
template <int N>
float largest_or_nan(const Floats (&x)[N]) {
  constexpr int kNanOrInfinite = 0x99;
  __m512 most = x[0];
  unsigned bad = 0;
  for (const Floats& vector : x) {
    most = max(most, vector);
    bad |= _mm512_fpclass_ps_mask(vector, kNanOrInfinite);
  }
  return bad != 0 ? __builtin_nanf("") : largest_of(most);
}

inline void store_codes(const Ints (&x)[2], int8_t* out) {
  for (int v = 0; v < 2; ++v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * v), _mm512_cvtsepi32_epi8(x[v]));
  }
}

// What the registers hold.
template <int Q>
constexpr int kFloatVectors = 4;
template <int Q>
constexpr int kInt8ScoreVectors = 4;
template <int Q>
constexpr int kInt8ValueVectors = 16 / Q;
template <int Q>
constexpr int kInt4ScoreVectors = Q > 2 ? 2 : 4;
constexpr int kInt8ValueQueries = 2;
constexpr int kNibbleVectors = 4;
constexpr int kPanelVectors = 1;
constexpr int kPanelTokens = 8;

inline __m512i load_bytes(const void* at) {
  __m512i bytes = _mm512_loadu_si512(at);
  asm("" : "+v"(bytes));
  return bytes;
}
inline __m512i broadcast4(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

constexpr size_t kDepth = 4;
using Bytes = __m512i;
using Code = __m512i;
inline Bytes load_rows(const std::byte* at, size_t) { return load_bytes(at); }
template <int kOffset>
Code unpack(Bytes bytes) {
  return kOffset == 0 ? bytes : _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}
inline Code low_nibbles(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Code high_nibbles(Bytes bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }

struct QueryNumbers {
  static constexpr int kByteOffset = 128;  // numbers are signed
  const int8_t* codes;

  void set(const Queries& queries, size_t query) { codes = queries.codes + query * queries.head_dim; }
};

struct WeightNumbers {
  static constexpr int kByteOffset = 0;
  alignas(64) uint8_t codes[KvLayout::kBlock];
  int32_t sum;
  float unit;

  void set(const Ints (&rounded)[4]) {
    __m512i sums = _mm512_setzero_si512();
    for (int v = 0; v < 4; ++v) {
      const __m512i code =
          _mm512_max_epi32(_mm512_min_epi32(rounded[v], _mm512_set1_epi32(255)), _mm512_setzero_si512());
      sums = add(sums, code);
      _mm_store_si128(reinterpret_cast<__m128i*>(codes) + v, _mm512_cvtepi32_epi8(code));
    }
    sum = sum_of(sums);
  }
};

// One of the two is unsigned: the code if it has an offset, else the number.
template <int kOffset>
Ints dot(Ints sum, Code code, __m512i number) {
  return kOffset == 0 ? _mm512_dpbusd_epi32(sum, number, code) : _mm512_dpbusd_epi32(sum, code, number);
}

template <int Q, int V>
struct Sums {
  Ints sum[Q][V];

  void start(int q, int32_t initial, int first = 0, int count = V) {
    for (int v = first; v < first + count; ++v) sum[q][v] = _mm512_set1_epi32(initial);
  }
  template <int N, class Numbers>
  void add(int q, int v, const Code (&code)[N], const Numbers& numbers, size_t k) {
    const __m512i number = broadcast4(numbers.codes + k);
    for (int i = 0; i < N; ++i) sum[q][v + i] = dot<Numbers::kByteOffset>(sum[q][v + i], code[i], number);
  }
  Ints get(int q, int v) const { return sum[q][v]; }
};

// A group's share of the excess, for codes with an offset of kOffset.
template <int kOffset, int G>
Ints excess_of(const int32_t* excess, int g) {
  if constexpr (kOffset == 0) return _mm512_setzero_si512();
  const Ints eighth = _mm512_set1_epi32(G == 1 ? excess[0] : g == 0 ? excess[1] : excess[0] - excess[1]);
  return kOffset == 8 ? eighth : _mm512_slli_epi32(eighth, 4);
}

template <WeightType kType, int T, int G>
void block_products(const std::byte* codes, const int8_t* const (&xs)[T], const int32_t* const (&excess)[T],
                    Ints (&out)[T][1][G]) {
  constexpr int kOffset = code_offset(kType);
  if constexpr (weight_bits(kType) == 4 && T == 1) {
    // High nibbles stay where they are: their products are 16 times as large, which one shift of the sum undoes.
    Ints low = excess_of<kOffset, 1>(excess[0], 0);
    Ints high = _mm512_setzero_si512();
    for (int i = 0; i < 4; ++i) {
      const __m512i bytes = load_bytes(codes + 64 * i);
      low = _mm512_dpbusd_epi32(low, low_nibbles(bytes), broadcast4(xs[0] + 4 * i));
      const __m512i shifted = _mm512_andnot_si512(_mm512_set1_epi8(15), bytes);
      high = _mm512_dpbusd_epi32(high, shifted, broadcast4(xs[0] + 16 + 4 * i));
    }
    out[0][0][0] = add(low, _mm512_srai_epi32(high, 4));
    return;
  }
  __m512i row[8];  // columns 4i .. 4i + 3 of all 16 rows
  for (int i = 0; i < weight_bits(kType); ++i) {
    const __m512i bytes = load_bytes(codes + 64 * i);
    if constexpr (weight_bits(kType) == 4) {
      row[i] = low_nibbles(bytes);
      row[4 + i] = high_nibbles(bytes);
    } else {
      row[i] = bytes;
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int g = 0; g < G; ++g) {
      Ints sum = excess_of<kOffset, G>(excess[t], g);
      for (int i = 8 / G * g; i < 8 / G * (g + 1); ++i)
        sum = _mm512_dpbusd_epi32(sum, row[i], broadcast4(xs[t] + 4 * i));
      out[t][0][g] = sum;
    }
  }
}

}  // namespace
}  // namespace meki
