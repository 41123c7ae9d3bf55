// What the AVX2 path computes in integers; see avx2.cc for what may not be in here. Products of bytes go through 16
// bits: queries and weights have 15, and _mm256_madd_epi16 cannot saturate with them.

#include "runtime/kernels/simd/avx2_common.h"

namespace meki {
namespace {

constexpr size_t kGroup = KvLayout::kGroup;

__m256i broadcast32(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return _mm256_set1_epi32(word);
}

// The 4 bytes of every 32-bit lane as 16-bit numbers, two lanes' worth: bytes 0 and 2, then bytes 1 and 3.
struct Pairs {
  __m256i even;
  __m256i odd;
};
Pairs signed_pairs(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

Pairs low_nibbles(__m256i bytes) {
  const __m256i mask = _mm256_set1_epi16(15);
  return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 8), mask)};
}
Pairs high_nibbles(__m256i bytes) {
  return {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(15)), _mm256_srli_epi16(bytes, 12)};
}

// Stores 16 numbers so that each 4 of them are numbers 0 and 2, then 1 and 3: what Pairs are multiplied by.
void store_paired(__m256i numbers, int16_t* out) {
  constexpr int kOrder = 0xD8;  // 0, 2, 1, 3
  const __m256i paired = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(numbers, kOrder), kOrder);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), paired);
}

// sum + what 4 bytes times 4 numbers are, in every lane.
__m256i add_pair_products(__m256i sum, const Pairs& bytes, __m256i even, __m256i odd) {
  return _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(bytes.even, even)),
                          _mm256_madd_epi16(bytes.odd, odd));
}

// Sums of products with a row of numbers a query, as store_paired has them:
//
//   sum[q][v] += sum over k of numbers[q][k] * code k of columns 8v .. 8v + 7
//
// for int8 codes [count / 4][columns][4]; of nibbles there are 2 * count, 0 to 15: low ones first.
template <int Q, int V>
void add_byte_products(const std::byte* codes, size_t columns, size_t count, const int16_t* const (&numbers)[Q],
                       const std::byte* next, __m256i (&sum)[Q][V]) {
  for (size_t k = 0; k < count; k += 4) {
    if (next != nullptr) prefetch(next + k * columns, 32 * V);
    Pairs code[V];
    for (int v = 0; v < V; ++v) code[v] = signed_pairs(load(codes + k * columns + 32 * v));
    for (int q = 0; q < Q; ++q) {
      const __m256i even = broadcast32(numbers[q] + k);
      const __m256i odd = broadcast32(numbers[q] + k + 2);
      for (int v = 0; v < V; ++v) sum[q][v] = add_pair_products(sum[q][v], code[v], even, odd);
    }
  }
}

template <int Q, int V>
void add_nibble_products(const std::byte* codes, size_t columns, size_t count, const int16_t* const (&numbers)[Q],
                         const std::byte* next, __m256i (&sum)[Q][V]) {
  for (size_t k = 0; k < count; k += 4) {
    if (next != nullptr) prefetch(next + k * columns, 32 * V);
    for (int v = 0; v < V; ++v) {
      const __m256i bytes = load(codes + k * columns + 32 * v);
      const Pairs code[2] = {low_nibbles(bytes), high_nibbles(bytes)};
      for (int q = 0; q < Q; ++q) {
        for (size_t half = 0; half < 2; ++half) {
          const int16_t* const number = numbers[q] + half * count + k;
          sum[q][v] = add_pair_products(sum[q][v], code[half], broadcast32(number), broadcast32(number + 2));
        }
      }
    }
  }
}

// 128 * high + low of one query, as store_paired has it.
void pair_query(const Queries& queries, size_t query, int16_t* out) {
  const size_t head_dim = queries.head_dim;
  for (size_t e = 0; e < head_dim; e += 16) {
    const size_t at = query * head_dim + e;
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(queries.high + at)));
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(queries.low + at)));
    store_paired(_mm256_add_epi16(_mm256_slli_epi16(high, 7), low), out + e);
  }
}

struct Int8Scores {
  const Queries& queries;
  const std::byte* block;
  const std::byte* next;
  float* scores;

  template <int Q>
  void run(size_t first) const {
    constexpr int V = kVectors<Q>;
    const auto* const scales = reinterpret_cast<const float*>(block);
    int16_t paired[Q][KvLayout::kMaxHeadDim];
    const int16_t* numbers[Q];
    for (int q = 0; q < Q; ++q) {
      pair_query(queries, first + q, paired[q]);
      numbers[q] = paired[q];
    }
    for (size_t p = 0; p < kBlock; p += 8 * V) {
      const size_t at = kBlock * sizeof(float) + 4 * p;
      __m256i sum[Q][V];
      for (auto& row : sum) {
        for (__m256i& vector : row) vector = _mm256_setzero_si256();
      }
      add_byte_products(block + at, kBlock, queries.head_dim, numbers,
                        first == 0 && next != nullptr ? next + at : nullptr, sum);
      for (int q = 0; q < Q; ++q) {
        const __m256 query_scale = _mm256_set1_ps(queries.scales[first + q]);
        for (int v = 0; v < V; ++v) {
          const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales + p + 8 * v), query_scale);
          _mm256_storeu_ps(scores + (first + q) * kBlock + p + 8 * v,
                           _mm256_mul_ps(_mm256_cvtepi32_ps(sum[q][v]), scale));
        }
      }
    }
  }
};

struct Int4Scores {
  const Queries& queries;
  const std::byte* block;
  const std::byte* next;
  float* scores;

  template <int Q>
  void run(size_t first) const {
    constexpr int V = kVectors<Q> / 2;  // there are as many totals
    const size_t groups = queries.head_dim / kGroup;
    const auto* const scales = reinterpret_cast<const uint16_t*>(block);
    int16_t paired[Q][KvLayout::kMaxHeadDim];
    for (int q = 0; q < Q; ++q) pair_query(queries, first + q, paired[q]);
    for (size_t p = 0; p < kBlock; p += 8 * V) {
      __m256 total[Q][V];
      for (auto& row : total) {
        for (__m256& vector : row) vector = _mm256_setzero_ps();
      }
      for (size_t g = 0; g < groups; ++g) {
        const size_t at = groups * kBlock * sizeof(uint16_t) + g * kGroup / 2 * kBlock + 4 * p;
        const int16_t* numbers[Q];
        __m256i sum[Q][V];
        for (int q = 0; q < Q; ++q) {
          numbers[q] = paired[q] + g * kGroup;
          const int32_t* const sums = queries.sums + (first + q) * 2 * groups + 2 * g;
          for (__m256i& vector : sum[q]) vector = _mm256_set1_epi32(-8 * (sums[0] + sums[1]));  // nibbles are code + 8
        }
        add_nibble_products(block + at, kBlock, kGroup / 2, numbers,
                            first == 0 && next != nullptr ? next + at : nullptr, sum);
        for (int v = 0; v < V; ++v) {
          const __m256 scale = load_floats(scales + g * kBlock + p + 8 * v);
          for (int q = 0; q < Q; ++q) {
            total[q][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[q][v]), scale, total[q][v]);
          }
        }
      }
      for (int q = 0; q < Q; ++q) {
        const __m256 scale = _mm256_set1_ps(queries.scales[first + q]);
        for (int v = 0; v < V; ++v) {
          _mm256_storeu_ps(scores + (first + q) * kBlock + p + 8 * v, _mm256_mul_ps(total[q][v], scale));
        }
      }
    }
  }
};

// Weights of one query in 14 bits, as store_paired has them, worth `unit` each.
struct WeightCodes {
  int16_t paired[kBlock];
  float unit;
  int32_t sum;
};

template <class T>
void quantize_weights(const float* weights, const T* scales, WeightCodes& out) {
  __m256 scaled[8];
  __m256 most = _mm256_setzero_ps();
  __m256 poison = _mm256_setzero_ps();  // max is no home for a NaN
  for (int v = 0; v < 8; ++v) {
    scaled[v] = _mm256_mul_ps(_mm256_loadu_ps(weights + 8 * v), load_floats(scales + 8 * v));
    most = _mm256_max_ps(most, scaled[v]);
    poison = _mm256_fmadd_ps(scaled[v], _mm256_setzero_ps(), poison);
  }
  const float largest = largest_of(most) + sum_of(poison);
  const __m256 inverse = _mm256_set1_ps(quantizer(16383, largest));
  __m256i sum = _mm256_setzero_si256();
  for (int v = 0; v < 8; v += 2) {
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(scaled[v], inverse));
    const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(scaled[v + 1], inverse));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
    const __m256i code = _mm256_max_epi16(_mm256_min_epi16(packed, _mm256_set1_epi16(16383)), _mm256_setzero_si256());
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(code, _mm256_set1_epi16(1)));
    store_paired(code, out.paired + 8 * v);
  }
  out.unit = largest / 16383;
  out.sum = sum_of(sum);
}

// out[q][0 .. 8V - 1] += sum * unit.
template <int Q, int V>
void add_scaled(const __m256i (&sum)[Q][V], const WeightCodes (&w)[Q], float* out, size_t head_dim) {
  for (int q = 0; q < Q; ++q) {
    const __m256 unit = _mm256_set1_ps(w[q].unit);
    for (int v = 0; v < V; ++v) {
      float* const at = out + q * head_dim + 8 * v;
      _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[q][v]), unit, _mm256_loadu_ps(at)));
    }
  }
}

struct Int8Values {
  const float* weights;
  size_t head_dim;
  const std::byte* block;
  const std::byte* next;
  float* outputs;

  template <int Q>
  void run(size_t first) const {
    WeightCodes w[Q];
    for (int q = 0; q < Q; ++q) {
      quantize_weights(weights + (first + q) * kBlock, reinterpret_cast<const float*>(block), w[q]);
    }
    size_t e = 0;
    for (; e + 8 * kVectors<Q> <= head_dim; e += 8 * kVectors<Q>) columns<Q, kVectors<Q>>(first, e, w);
    for (; e < head_dim; e += 16) columns<Q, 2>(first, e, w);
  }
  template <int Q, int V>
  void columns(size_t first, size_t e, const WeightCodes (&w)[Q]) const {
    const size_t at = kBlock * sizeof(float) + 4 * e;
    const int16_t* numbers[Q];
    __m256i sum[Q][V];
    for (int q = 0; q < Q; ++q) {
      numbers[q] = w[q].paired;
      for (__m256i& vector : sum[q]) vector = _mm256_setzero_si256();
    }
    add_byte_products(block + at, head_dim, kBlock, numbers, first == 0 && next != nullptr ? next + at : nullptr, sum);
    add_scaled(sum, w, outputs + first * head_dim + e, head_dim);
  }
};

struct Int4Values {
  const float* weights;
  size_t head_dim;
  const std::byte* block;
  const std::byte* next;
  float* outputs;

  template <int Q>
  void run(size_t first) const {
    constexpr int V = Q == 4 ? 2 : 4;  // of the 4 vectors of a group
    for (size_t g = 0; g < head_dim / kGroup; ++g) {
      WeightCodes w[Q];
      for (int q = 0; q < Q; ++q) {
        quantize_weights(weights + (first + q) * kBlock, reinterpret_cast<const uint16_t*>(block) + g * kBlock, w[q]);
      }
      for (size_t e = g * kGroup; e < (g + 1) * kGroup; e += 8 * V) columns<Q, V>(first, e, w);
    }
  }
  template <int Q, int V>
  void columns(size_t first, size_t e, const WeightCodes (&w)[Q]) const {
    const size_t at = head_dim / kGroup * kBlock * sizeof(uint16_t) + 4 * e;
    const int16_t* numbers[Q];
    __m256i sum[Q][V];
    for (int q = 0; q < Q; ++q) {
      numbers[q] = w[q].paired;
      for (__m256i& vector : sum[q]) vector = _mm256_set1_epi32(-8 * w[q].sum);  // nibbles are code + 8
    }
    add_nibble_products(block + at, head_dim, kBlock / 2, numbers, first == 0 && next != nullptr ? next + at : nullptr,
                        sum);
    add_scaled(sum, w, outputs + first * head_dim + e, head_dim);
  }
};

// The products of one block of a panel with T tokens' inputs, int32 [T][2 vectors of 8 rows].
template <int T>
using BlockSums = __m256i[T][2];

// Nibbles, 0 to 15, times inputs in 8 bits: eight pairs of products fit into 16 bits.
template <int T>
void block_products4(const std::byte* codes, const int8_t* const (&xs)[T], const int32_t (&sums)[T],
                     BlockSums<T>& out) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i sum[T][2];
  for (auto& row : sum) row[0] = row[1] = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    __m256i low[2];
    __m256i high[2];
    for (int h = 0; h < 2; ++h) {
      const __m256i bytes = load(codes + 64 * i + 32 * h);
      low[h] = _mm256_and_si256(bytes, mask);
      high[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    }
    for (int t = 0; t < T; ++t) {
      const __m256i first = broadcast32(xs[t] + 4 * i);
      const __m256i second = broadcast32(xs[t] + 16 + 4 * i);
      for (int h = 0; h < 2; ++h) {
        sum[t][h] = _mm256_add_epi16(sum[t][h], _mm256_maddubs_epi16(low[h], first));
        sum[t][h] = _mm256_add_epi16(sum[t][h], _mm256_maddubs_epi16(high[h], second));
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    const __m256i excess = _mm256_set1_epi32(8 * sums[t]);
    for (int h = 0; h < 2; ++h) {
      out[t][h] = _mm256_sub_epi32(_mm256_madd_epi16(sum[t][h], _mm256_set1_epi16(1)), excess);
    }
  }
}

template <int T>
void block_products8(const std::byte* codes, const int8_t* const (&xs)[T], BlockSums<T>& out) {
  const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));  // codes are the value + 128
  int16_t paired[T][32];
  for (int t = 0; t < T; ++t) {
    for (int i = 0; i < 32; i += 16) {
      store_paired(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(xs[t] + i))), paired[t] + i);
    }
    out[t][0] = out[t][1] = _mm256_setzero_si256();
  }
  for (int i = 0; i < 8; ++i) {
    Pairs rows[2];
    for (int h = 0; h < 2; ++h) rows[h] = signed_pairs(_mm256_xor_si256(load(codes + 64 * i + 32 * h), sign));
    for (int t = 0; t < T; ++t) {
      const __m256i even = broadcast32(paired[t] + 4 * i);
      const __m256i odd = broadcast32(paired[t] + 4 * i + 2);
      for (int h = 0; h < 2; ++h) out[t][h] = add_pair_products(out[t][h], rows[h], even, odd);
    }
  }
}

template <int T, int kBits>
void panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kCodes = 64 * kBits;
  const size_t blocks = x.inputs / 32;
  __m256 total[T][2];
  for (auto& row : total) row[0] = row[1] = _mm256_setzero_ps();
  for (size_t b = 0; b < blocks; ++b, panel += kCodes + 32) {
    if constexpr (T == 1) prefetch(panel + 4096, kCodes + 32);  // decode: bound by memory
    const int8_t* xs[T];
    int32_t sums[T];
    for (int t = 0; t < T; ++t) {
      xs[t] = x.codes + (first + t) * x.inputs + 32 * b;
      sums[t] = x.sums[(first + t) * blocks + b];
    }
    BlockSums<T> products;
    if constexpr (kBits == 4) {
      block_products4<T>(panel, xs, sums, products);
    } else {
      block_products8<T>(panel, xs, products);
    }
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + kCodes);
    for (int h = 0; h < 2; ++h) {
      const __m256 row_scale = load_floats(row_scales + 8 * h);
      for (int t = 0; t < T; ++t) {
        const __m256 scale = _mm256_mul_ps(row_scale, _mm256_set1_ps(x.scales[(first + t) * blocks + b]));
        total[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t][h]), scale, total[t][h]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + (first + t) * stride + 8 * h, total[t][h]);
  }
}

template <int kBits>
void panel_all(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  for (; t + 4 <= x.tokens; t += 4) panel_tokens<4, kBits>(panel, x, t, out, stride);
  for (; t < x.tokens; ++t) panel_tokens<1, kBits>(panel, x, t, out, stride);
}

}  // namespace

void avx2::scores_int8(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries(queries.count, Int8Scores{queries, block, next, scores});
}

void avx2::scores_int4(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries(queries.count, Int4Scores{queries, block, next, scores});
}

void avx2::values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                       const std::byte* next, float* outputs) {
  for_queries(count, Int8Values{weights, head_dim, block, next, outputs});
}

void avx2::values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                       const std::byte* next, float* outputs) {
  for_queries(count, Int4Values{weights, head_dim, block, next, outputs});
}

void avx2::panel4(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  panel_all<4>(panel, x, out, stride);
}

void avx2::panel8(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  panel_all<8>(panel, x, out, stride);
}

}  // namespace meki
