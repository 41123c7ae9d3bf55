// AVX-512 with VNNI: attention over integer caches.

#include "runtime/kernels/simd/avx512_common.h"

namespace meki {
namespace {

constexpr size_t kGroup = KvLayout::kGroup;

// 128 * high + low.
__m512i join(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }

struct Int8Scores {
  const Queries& queries;
  const std::byte* block;
  const std::byte* next;
  float* scores;

  template <int Q>
  void run(size_t first) const {
    constexpr int kVectors = Q > 2 ? 2 : 4;  // what the registers hold
    for (int v = 0; v < 4; v += kVectors) positions<Q, kVectors>(first, v);
  }
  template <int Q, int V>
  void positions(size_t first, int vector) const {
    const size_t head_dim = queries.head_dim;
    const auto* const scales = reinterpret_cast<const float*>(block) + 16 * vector;
    const std::byte* const codes = block + kBlock * sizeof(float) + 64 * vector;
    const int8_t* const high = queries.high + first * head_dim;
    const int8_t* const low = queries.low + first * head_dim;
    const bool fetch = first == 0 && next != nullptr;
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i highs[Q][V];
    __m512i lows[Q][V];
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) highs[q][v] = lows[q][v] = _mm512_setzero_si512();
    }
    for (size_t e = 0; e < head_dim; e += 4) {
      __m512i key[V];
      for (int v = 0; v < V; ++v) {
        if (fetch) prefetch(next + 64 * (vector + v) + e * kBlock);
        key[v] = _mm512_xor_si512(load(codes + 64 * v + e * kBlock), sign);  // code + 128, unsigned
      }
      for (int q = 0; q < Q; ++q) {
        const __m512i h = broadcast4(high + q * head_dim + e);
        const __m512i l = broadcast4(low + q * head_dim + e);
        for (int v = 0; v < V; ++v) {
          highs[q][v] = _mm512_dpbusd_epi32(highs[q][v], key[v], h);
          lows[q][v] = _mm512_dpbusd_epi32(lows[q][v], key[v], l);
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      const int32_t* const sums = queries.sums + (first + q) * (head_dim / 16);
      int32_t sum = 0;
      for (size_t g = 0; g < head_dim / 16; ++g) sum += sums[g];
      const __m512i excess = _mm512_set1_epi32(128 * sum);
      const __m512 scale = _mm512_set1_ps(queries.scales[first + q]);
      for (int v = 0; v < V; ++v) {
        const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(join(highs[q][v], lows[q][v]), excess));
        _mm512_storeu_ps(scores + (first + q) * kBlock + 16 * (vector + v),
                         _mm512_mul_ps(product, _mm512_mul_ps(_mm512_loadu_ps(scales + 16 * v), scale)));
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
    constexpr int kVectors = Q > 2 ? 2 : 4;
    for (int v = 0; v < 4; v += kVectors) positions<Q, kVectors>(first, v);
  }
  template <int Q, int V>
  void positions(size_t first, int vector) const {
    const size_t head_dim = queries.head_dim;
    const size_t groups = head_dim / kGroup;
    const auto* const scales = reinterpret_cast<const uint16_t*>(block) + 16 * vector;
    const std::byte* codes = block + groups * kBlock * sizeof(uint16_t) + 64 * vector;
    const bool fetch = first == 0 && next != nullptr;
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 total[Q][V];
    for (auto& row : total) {
      for (__m512& value : row) value = _mm512_setzero_ps();
    }
    for (size_t g = 0; g < groups; ++g, codes += 4 * 4 * kBlock) {
      __m512i highs[Q][V];
      __m512i lows[Q][V];
      for (int q = 0; q < Q; ++q) {
        const int32_t* const sums = queries.sums + (first + q) * (head_dim / 16) + 2 * g;
        for (int v = 0; v < V; ++v) {
          highs[q][v] = _mm512_setzero_si512();
          lows[q][v] = _mm512_set1_epi32(-8 * (sums[0] + sums[1]));  // nibbles are code + 8
        }
      }
      for (size_t i = 0; i < 4; ++i) {
        __m512i key[2][V];
        for (int v = 0; v < V; ++v) {
          if (fetch) prefetch(next + (codes - block) + static_cast<ptrdiff_t>(i * 4 * kBlock) + 64 * v);
          const __m512i bytes = load(codes + i * 4 * kBlock + 64 * v);
          key[0][v] = _mm512_and_si512(bytes, mask);
          key[1][v] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
        }
        for (int half = 0; half < 2; ++half) {
          for (int q = 0; q < Q; ++q) {
            const size_t at = (first + q) * head_dim + g * kGroup + 16 * half + 4 * i;
            const __m512i h = broadcast4(queries.high + at);
            const __m512i l = broadcast4(queries.low + at);
            for (int v = 0; v < V; ++v) {
              highs[q][v] = _mm512_dpbusd_epi32(highs[q][v], key[half][v], h);
              lows[q][v] = _mm512_dpbusd_epi32(lows[q][v], key[half][v], l);
            }
          }
        }
      }
      for (int v = 0; v < V; ++v) {
        const __m512 scale = halves(scales + g * kBlock + 16 * v);
        for (int q = 0; q < Q; ++q) {
          total[q][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(join(highs[q][v], lows[q][v])), scale, total[q][v]);
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      const __m512 scale = _mm512_set1_ps(queries.scales[first + q]);
      for (int v = 0; v < V; ++v) {
        _mm512_storeu_ps(scores + (first + q) * kBlock + 16 * (vector + v), _mm512_mul_ps(total[q][v], scale));
      }
    }
  }
};

// Weights of one query in 14 bits: unit * (128 * high + low).
struct WeightCodes {
  alignas(64) uint8_t high[kBlock];
  alignas(64) uint8_t low[kBlock];
  float unit;
  int32_t sum;
};

void quantize_weights(const __m512 (&scaled)[4], WeightCodes& out) {
  const __m512 pairs = _mm512_max_ps(_mm512_max_ps(scaled[0], scaled[1]), _mm512_max_ps(scaled[2], scaled[3]));
  const bool nan = (_mm512_cmp_ps_mask(scaled[0], scaled[1], _CMP_UNORD_Q) |
                    _mm512_cmp_ps_mask(scaled[2], scaled[3], _CMP_UNORD_Q)) != 0;
  const float largest = nan ? __builtin_nanf("") : _mm512_reduce_max_ps(pairs);
  const __m512 inverse = _mm512_set1_ps(quantizer(16383, largest));
  __m512i sum = _mm512_setzero_si512();
  for (int v = 0; v < 4; ++v) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[v], inverse));
    const __m512i code = _mm512_max_epi32(_mm512_min_epi32(rounded, _mm512_set1_epi32(16383)), _mm512_setzero_si512());
    sum = _mm512_add_epi32(sum, code);
    _mm_store_si128(reinterpret_cast<__m128i*>(out.high) + v, _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 7)));
    _mm_store_si128(reinterpret_cast<__m128i*>(out.low) + v,
                    _mm512_cvtepi32_epi8(_mm512_and_si512(code, _mm512_set1_epi32(127))));
  }
  out.unit = largest / 16383;
  out.sum = _mm512_reduce_add_epi32(sum);
}

struct Int8Values {
  const float* weights;
  size_t head_dim;
  const std::byte* block;
  const std::byte* next;
  float* outputs;

  template <int Q>
  void run(size_t first) const {
    const auto* const scales = reinterpret_cast<const float*>(block);
    WeightCodes w[Q];
    for (int q = 0; q < Q; ++q) {
      __m512 scaled[4];
      for (int v = 0; v < 4; ++v) {
        scaled[v] =
            _mm512_mul_ps(_mm512_loadu_ps(weights + (first + q) * kBlock + 16 * v), _mm512_loadu_ps(scales + 16 * v));
      }
      quantize_weights(scaled, w[q]);
    }
    size_t e = 0;
    for (; e + 64 <= head_dim; e += 64) columns<Q, 4>(first, e, w);
    for (; e < head_dim; e += 16) columns<Q, 1>(first, e, w);
  }
  template <int Q, int V>
  void columns(size_t first, size_t e, const WeightCodes (&w)[Q]) const {
    const std::byte* const codes = block + kBlock * sizeof(float) + 4 * e;
    const bool fetch = first == 0 && next != nullptr;
    __m512i highs[Q][V];
    __m512i lows[Q][V];
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) highs[q][v] = lows[q][v] = _mm512_setzero_si512();
    }
    for (size_t p = 0; p < kBlock; p += 4) {
      __m512i value[V];
      for (int v = 0; v < V; ++v) {
        if (fetch) prefetch(next + 4 * e + 64 * v + p * head_dim);
        value[v] = load(codes + 64 * v + p * head_dim);
      }
      for (int q = 0; q < Q; ++q) {
        const __m512i h = broadcast4(w[q].high + p);
        const __m512i l = broadcast4(w[q].low + p);
        for (int v = 0; v < V; ++v) {
          highs[q][v] = _mm512_dpbusd_epi32(highs[q][v], h, value[v]);
          lows[q][v] = _mm512_dpbusd_epi32(lows[q][v], l, value[v]);
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      const __m512 unit = _mm512_set1_ps(w[q].unit);
      for (int v = 0; v < V; ++v) {
        float* const out = outputs + (first + q) * head_dim + e + 16 * v;
        const __m512 product = _mm512_cvtepi32_ps(join(highs[q][v], lows[q][v]));
        _mm512_storeu_ps(out, _mm512_fmadd_ps(product, unit, _mm512_loadu_ps(out)));
      }
    }
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
    for (size_t g = 0; g < head_dim / kGroup; ++g) group<Q>(first, g);
  }
  template <int Q>
  void group(size_t first, size_t g) const {
    constexpr int V = 2;  // vectors of 16 elements in a group
    const std::byte* const codes = block + head_dim / kGroup * kBlock * sizeof(uint16_t) + 4 * kGroup * g;
    const auto* const scales = reinterpret_cast<const uint16_t*>(block) + g * kBlock;
    const bool fetch = first == 0 && next != nullptr;
    const __m512i mask = _mm512_set1_epi8(15);
    WeightCodes w[Q];
    __m512i highs[Q][V];
    __m512i lows[Q][V];
    for (int q = 0; q < Q; ++q) {
      __m512 scaled[4];
      for (int v = 0; v < 4; ++v) {
        scaled[v] = _mm512_mul_ps(_mm512_loadu_ps(weights + (first + q) * kBlock + 16 * v), halves(scales + 16 * v));
      }
      quantize_weights(scaled, w[q]);
      for (int v = 0; v < V; ++v) {
        highs[q][v] = _mm512_setzero_si512();
        lows[q][v] = _mm512_set1_epi32(-8 * w[q].sum);
      }
    }
    for (size_t p = 0; p < kBlock / 2; p += 4) {
      for (int v = 0; v < V; ++v) {
        const std::byte* const at = codes + 64 * v + p * head_dim;
        if (fetch) prefetch(next + (at - block));
        const __m512i bytes = load(at);
        const __m512i value[2] = {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
        for (size_t half = 0; half < 2; ++half) {
          for (int q = 0; q < Q; ++q) {
            highs[q][v] = _mm512_dpbusd_epi32(highs[q][v], broadcast4(w[q].high + 32 * half + p), value[half]);
            lows[q][v] = _mm512_dpbusd_epi32(lows[q][v], broadcast4(w[q].low + 32 * half + p), value[half]);
          }
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      const __m512 unit = _mm512_set1_ps(w[q].unit);
      for (int v = 0; v < V; ++v) {
        float* const out = outputs + (first + q) * head_dim + g * kGroup + 16 * v;
        const __m512 product = _mm512_cvtepi32_ps(join(highs[q][v], lows[q][v]));
        _mm512_storeu_ps(out, _mm512_fmadd_ps(product, unit, _mm512_loadu_ps(out)));
      }
    }
  }
};

}  // namespace

void avx512::scores_int8(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries<4>(queries.count, Int8Scores{queries, block, next, scores});
}

void avx512::scores_int4(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries<4>(queries.count, Int4Scores{queries, block, next, scores});
}

void avx512::values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                         const std::byte* next, float* outputs) {
  for_queries<2>(count, Int8Values{weights, head_dim, block, next, outputs});
}

void avx512::values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                         const std::byte* next, float* outputs) {
  for_queries<4>(count, Int4Values{weights, head_dim, block, next, outputs});
}

}  // namespace meki
