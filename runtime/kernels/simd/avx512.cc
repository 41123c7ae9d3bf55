// AVX-512 with VNNI: float attention, softmax, and linear layers.

#include "runtime/kernels/simd/avx512_common.h"

namespace meki {
namespace {

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
                          {scores_float<float>, scores_float<uint16_t>, avx512::scores_int8, avx512::scores_int4},
                          {values_float<float>, values_float<uint16_t>, avx512::values_int8, avx512::values_int4},
                          softmax,
                          swiglu,
                          quantize,
                          panel<4>,
                          panel<8>};

}  // namespace meki
