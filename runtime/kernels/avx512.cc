// AVX-512 with VNNI. Compiled with those instructions enabled: nothing but intrinsics and what is local to this file
// may be instantiated here, or another file's copy of a shared inline function could be replaced by one that not every
// CPU runs.

#include <immintrin.h>

#include "kernels/paths.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kGroup = KvLayout::kGroup;

__m512i load(const void* at) { return _mm512_loadu_si512(at); }
__m512 halves(const void* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at))); }
// Into the second-level cache: the first has too few outstanding misses to stream from memory with.
void prefetch(const std::byte* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// As in rounding.h, which must not be included here.
float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

// 4 neighbouring bytes in every lane.
__m512i broadcast4(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

__m512 load_floats(const float* at) { return _mm512_loadu_ps(at); }
__m512 load_floats(const uint16_t* at) { return halves(at); }

// e^x for x <= 0; 0 for -inf: 2^n times a polynomial of degree 6, fitted to e^r for |r| <= ln(2) / 2. Within 1 ulp.
__m512 exp_negative(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0F), x);  // e^-104 rounds to 0; a NaN stays one in the second place
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504F)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375F), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4F), r);
  __m512 p = _mm512_set1_ps(0.0013814467F);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0083687808F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.041668393F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.16666520F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.49999994F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, n);
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

template <class T>
struct FloatScores {
  const Queries& queries;
  const T* keys;
  const std::byte* next;
  float* scores;

  template <int Q>
  void run(size_t first) const {
    constexpr int kVectors = 4;  // of 16 positions
    const size_t head_dim = queries.head_dim;
    const float* const query = queries.values + first * head_dim;
    const bool fetch = first == 0 && next != nullptr;
    __m512 sum[Q][kVectors];
    for (auto& row : sum) {
      for (__m512& vector : row) vector = _mm512_setzero_ps();
    }
    for (size_t e = 0; e < head_dim; ++e) {
      if (fetch) {
        for (size_t line = 0; line < sizeof(T); ++line) prefetch(next + (e * sizeof(T) + line) * 64);
      }
      for (int v = 0; v < kVectors; ++v) {
        const __m512 key = load_floats(keys + e * kBlock + 16 * v);
        for (int q = 0; q < Q; ++q) {
          sum[q][v] = _mm512_fmadd_ps(key, _mm512_set1_ps(query[q * head_dim + e]), sum[q][v]);
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(scores + (first + q) * kBlock + 16 * v, sum[q][v]);
    }
  }
};

template <class T>
void scores_float(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries<4>(queries.count, FloatScores<T>{queries, reinterpret_cast<const T*>(block), next, scores});
}

template <class T>
struct FloatValues {
  const float* weights;
  size_t head_dim;
  const T* values;
  const std::byte* next;
  float* outputs;

  template <int Q>
  void run(size_t first) const {
    size_t e = 0;
    for (; e + 64 <= head_dim; e += 64) columns<Q, 4>(first, e);
    for (; e < head_dim; e += 16) columns<Q, 1>(first, e);
  }
  template <int Q, int V>
  void columns(size_t first, size_t e) const {
    const bool fetch = first == 0 && next != nullptr;
    __m512 sum[Q][V];
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) sum[q][v] = _mm512_loadu_ps(outputs + (first + q) * head_dim + e + 16 * v);
    }
    for (size_t p = 0; p < kBlock; ++p) {
      const size_t at = p * head_dim + e;
      if (fetch) {
        for (size_t line = 0; line < V * 16 * sizeof(T); line += 64) prefetch(next + at * sizeof(T) + line);
      }
      for (int v = 0; v < V; ++v) {
        const __m512 value = load_floats(values + at + 16 * v);
        for (int q = 0; q < Q; ++q) {
          sum[q][v] = _mm512_fmadd_ps(value, _mm512_set1_ps(weights[(first + q) * kBlock + p]), sum[q][v]);
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) _mm512_storeu_ps(outputs + (first + q) * head_dim + e + 16 * v, sum[q][v]);
    }
  }
};

template <class T>
void values_float(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                  float* outputs) {
  for_queries<4>(count, FloatValues<T>{weights, head_dim, reinterpret_cast<const T*>(block), next, outputs});
}

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

void scores_int8(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries<4>(queries.count, Int8Scores{queries, block, next, scores});
}

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

void scores_int4(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries<4>(queries.count, Int4Scores{queries, block, next, scores});
}

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

void values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                 float* outputs) {
  for_queries<2>(count, Int8Values{weights, head_dim, block, next, outputs});
}

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

void values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                 float* outputs) {
  for_queries<4>(count, Int4Values{weights, head_dim, block, next, outputs});
}

void softmax(float* scores, float* maximum, float* sum, float* output, size_t head_dim) {
  __m512 score[4];
  for (int v = 0; v < 4; ++v) score[v] = _mm512_loadu_ps(scores + 16 * v);
  const float block_max =
      _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3])));
  const float largest = block_max > *maximum ? block_max : *maximum;
  if (largest == -__builtin_inff()) {
    __m512 total = _mm512_setzero_ps();  // nothing to see but, perhaps, NaN
    for (int v = 0; v < 4; ++v) {
      const __m512 weight = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(score[v], score[v], _CMP_UNORD_Q), score[v]);
      _mm512_storeu_ps(scores + 16 * v, weight);
      total = _mm512_add_ps(total, weight);
    }
    *sum += _mm512_reduce_add_ps(total);
    return;
  }
  if (largest > *maximum) {
    const __m512 shrink = exp_negative(_mm512_set1_ps(*maximum - largest));
    *sum *= _mm512_cvtss_f32(shrink);
    for (size_t e = 0; e < head_dim; e += 16) {
      _mm512_storeu_ps(output + e, _mm512_mul_ps(_mm512_loadu_ps(output + e), shrink));
    }
    *maximum = largest;
  }
  __m512 total = _mm512_setzero_ps();
  for (int v = 0; v < 4; ++v) {
    const __m512 weight = exp_negative(_mm512_sub_ps(score[v], _mm512_set1_ps(largest)));
    total = _mm512_add_ps(total, weight);
    _mm512_storeu_ps(scores + 16 * v, weight);
  }
  *sum += _mm512_reduce_add_ps(total);
}

void swiglu(const float* gate, const float* up, size_t count, float* out) {
  const __m512 one = _mm512_set1_ps(1);
  for (size_t i = 0; i < count; i += 16) {
    const __m512 x = _mm512_loadu_ps(gate + i);
    const __m512 e = exp_negative(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    // sigmoid(x): 1 / (1 + e) for x >= 0, e / (1 + e) otherwise, and nothing overflows.
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 sigmoid = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid), _mm512_loadu_ps(up + i)));
  }
}

void quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* sums) {
  for (size_t b = 0; b < inputs / 32; ++b, x += 32, codes += 32) {
    const __m512 first = _mm512_loadu_ps(x);
    const __m512 second = _mm512_loadu_ps(x + 16);
    // max is no home for a NaN: what is infinite or NaN is brought back by x * 0.
    const __m512 zero = _mm512_setzero_ps();
    const float poison = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_mul_ps(first, zero), _mm512_mul_ps(second, zero)));
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second))) + poison;
    const __m512 inverse = _mm512_set1_ps(quantizer(127, largest));
    const __m512 floor = _mm512_set1_ps(-127);  // what NaN becomes: the second operand of max
    const __m512i low = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_mul_ps(first, inverse), floor));
    const __m512i high = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_mul_ps(second, inverse), floor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtsepi32_epi8(high));
    scales[b] = largest / 127;
    sums[b] = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
  }
}

// T tokens against a panel whose block is C code vectors and 16 half scales; `unpack` makes 8 vectors of unsigned
// codes, each the value + kOffset, out of them: vector i has columns 4i .. 4i + 3 of all 16 rows.
template <int T, int kBits>
void panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kCodes = 64 * kBits;
  constexpr int kOffset = kBits == 4 ? 8 : 128;
  const size_t blocks = x.inputs / 32;
  const int8_t* const codes = x.codes + first * x.inputs;
  const float* const scales = x.scales + first * blocks;
  const int32_t* const sums = x.sums + first * blocks;
  const __m512i mask = _mm512_set1_epi8(15);
  __m512 total[T];
  for (__m512& value : total) value = _mm512_setzero_ps();
  for (size_t b = 0; b < blocks; ++b, panel += kCodes + 32) {
    if constexpr (T == 1) {  // decode: bound by memory
      for (int line = 0; line <= kCodes / 64; ++line) prefetch(panel + 4096 + 64 * line);
    }
    __m512i row[8];
    for (int i = 0; i < kBits; ++i) {
      const __m512i bytes = load(panel + 64 * i);
      if constexpr (kBits == 4) {
        row[i] = _mm512_and_si512(bytes, mask);
        row[4 + i] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
      } else {
        row[i] = bytes;
      }
    }
    const __m512 row_scale = halves(panel + kCodes);
    for (int t = 0; t < T; ++t) {
      const int8_t* const xs = codes + t * x.inputs + 32 * b;
      __m512i even = _mm512_set1_epi32(-kOffset * sums[t * blocks + b]);
      __m512i odd = _mm512_setzero_si512();
      for (int i = 0; i < 8; i += 2) {
        even = _mm512_dpbusd_epi32(even, row[i], broadcast4(xs + 4 * i));
        odd = _mm512_dpbusd_epi32(odd, row[i + 1], broadcast4(xs + 4 * i + 4));
      }
      const __m512 scale = _mm512_mul_ps(row_scale, _mm512_set1_ps(scales[t * blocks + b]));
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), scale, total[t]);
    }
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + (first + t) * stride, total[t]);
}

template <int kBits>
void panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  for (; t + 8 <= x.tokens; t += 8) panel_tokens<8, kBits>(panel, x, t, out, stride);
  for (; t + 4 <= x.tokens; t += 4) panel_tokens<4, kBits>(panel, x, t, out, stride);
  for (; t < x.tokens; ++t) panel_tokens<1, kBits>(panel, x, t, out, stride);
}

}  // namespace

const Simd kAvx512Vnni = {"avx512vnni",
                          {scores_float<float>, scores_float<uint16_t>, scores_int8, scores_int4},
                          {values_float<float>, values_float<uint16_t>, values_int8, values_int4},
                          softmax,
                          swiglu,
                          quantize,
                          panel<4>,
                          panel<8>};

}  // namespace meki
