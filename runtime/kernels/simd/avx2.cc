// AVX2 with FMA and F16C. Compiled with those instructions enabled: nothing but intrinsics and what is local to this
// file may be instantiated here, or another file's copy of a shared inline function could be replaced by one that not
// every CPU runs.

#include "runtime/kernels/simd/avx2_common.h"

namespace meki {
namespace {

// e^x for x <= 0; 0 for -inf. Cephes-style range reduction with a degree 6 minimax polynomial: within 1 ulp.
__m256 exp_negative(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-104.0F), x);  // e^-104 rounds to 0; a NaN stays one in the second place
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504F)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375F), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4F), r);
  __m256 p = _mm256_set1_ps(0.0013814467F);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.0083687808F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.041668393F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.16666520F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.49999994F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0F));
  // 2^n in two factors that are normal numbers.
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

// sum[q][v] += sum over k of numbers[q][k] * rows[k][8v .. 8v + 7], for `count` rows of `columns` elements.
template <int Q, int V, class T>
void add_products(const T* rows, size_t columns, size_t count, const float* numbers, size_t stride,
                  const std::byte* next, __m256 (&sum)[Q][V]) {
  for (size_t k = 0; k < count; ++k) {
    if (next != nullptr) prefetch(next + k * columns * sizeof(T), 8 * V * sizeof(T));
    for (int v = 0; v < V; ++v) {
      const __m256 row = load_floats(rows + k * columns + 8 * v);
      for (int q = 0; q < Q; ++q) {
        sum[q][v] = _mm256_fmadd_ps(row, _mm256_set1_ps(numbers[q * stride + k]), sum[q][v]);
      }
    }
  }
}

template <class T>
struct FloatScores {
  const Queries& queries;
  const T* keys;
  const std::byte* next;
  float* scores;

  template <int Q>
  void run(size_t first) const {
    constexpr int V = kVectors<Q>;
    const size_t head_dim = queries.head_dim;
    for (size_t p = 0; p < kBlock; p += 8 * V) {
      __m256 sum[Q][V];
      for (auto& row : sum) {
        for (__m256& vector : row) vector = _mm256_setzero_ps();
      }
      add_products(keys + p, kBlock, head_dim, queries.values + first * head_dim, head_dim,
                   first == 0 && next != nullptr ? next + p * sizeof(T) : nullptr, sum);
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) _mm256_storeu_ps(scores + (first + q) * kBlock + p + 8 * v, sum[q][v]);
      }
    }
  }
};

template <class T>
void scores_float(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries(queries.count, FloatScores<T>{queries, reinterpret_cast<const T*>(block), next, scores});
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
    for (; e + 8 * kVectors<Q> <= head_dim; e += 8 * kVectors<Q>) columns<Q, kVectors<Q>>(first, e);
    for (; e < head_dim; e += 16) columns<Q, 2>(first, e);
  }
  template <int Q, int V>
  void columns(size_t first, size_t e) const {
    float* const out = outputs + first * head_dim + e;
    __m256 sum[Q][V];
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) sum[q][v] = _mm256_loadu_ps(out + q * head_dim + 8 * v);
    }
    add_products(values + e, head_dim, kBlock, weights + first * kBlock, kBlock,
                 first == 0 && next != nullptr ? next + e * sizeof(T) : nullptr, sum);
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) _mm256_storeu_ps(out + q * head_dim + 8 * v, sum[q][v]);
    }
  }
};

template <class T>
void values_float(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                  float* outputs) {
  for_queries(count, FloatValues<T>{weights, head_dim, reinterpret_cast<const T*>(block), next, outputs});
}

void softmax(float* scores, float* maximum, float* sum, float* output, size_t head_dim) {
  __m256 score[8];
  for (int v = 0; v < 8; ++v) score[v] = _mm256_loadu_ps(scores + 8 * v);
  __m256 most = score[0];
  for (int v = 1; v < 8; ++v) most = _mm256_max_ps(most, score[v]);
  const float block_max = largest_of(most);
  const float largest = block_max > *maximum ? block_max : *maximum;
  __m256 total = _mm256_setzero_ps();
  if (largest == -__builtin_inff()) {  // nothing to see but, perhaps, NaN
    for (int v = 0; v < 8; ++v) {
      const __m256 weight = _mm256_and_ps(_mm256_cmp_ps(score[v], score[v], _CMP_UNORD_Q), score[v]);
      total = _mm256_add_ps(total, weight);
      _mm256_storeu_ps(scores + 8 * v, weight);
    }
    *sum += sum_of(total);
    return;
  }
  if (largest > *maximum) {
    const __m256 shrink = exp_negative(_mm256_set1_ps(*maximum - largest));
    *sum *= _mm256_cvtss_f32(shrink);
    for (size_t e = 0; e < head_dim; e += 8) {
      _mm256_storeu_ps(output + e, _mm256_mul_ps(_mm256_loadu_ps(output + e), shrink));
    }
    *maximum = largest;
  }
  for (int v = 0; v < 8; ++v) {
    const __m256 weight = exp_negative(_mm256_sub_ps(score[v], _mm256_set1_ps(largest)));
    total = _mm256_add_ps(total, weight);
    _mm256_storeu_ps(scores + 8 * v, weight);
  }
  *sum += sum_of(total);
}

void swiglu(const float* gate, const float* up, size_t count, float* out) {
  const __m256 one = _mm256_set1_ps(1);
  for (size_t i = 0; i < count; i += 8) {
    const __m256 x = _mm256_loadu_ps(gate + i);
    const __m256 e = exp_negative(_mm256_or_ps(x, _mm256_set1_ps(-0.0F)));  // of -|x|
    // sigmoid(x): 1 / (1 + e) for x >= 0, e / (1 + e) otherwise, and nothing overflows.
    const __m256 sigmoid = _mm256_div_ps(_mm256_blendv_ps(one, e, x), _mm256_add_ps(one, e));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(x, sigmoid), _mm256_loadu_ps(up + i)));
  }
}

void quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* sums) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  for (size_t b = 0; b < inputs / 32; ++b, x += 32, codes += 32) {
    __m256 most = _mm256_setzero_ps();
    __m256 poison = _mm256_setzero_ps();  // max is no home for a NaN
    for (int v = 0; v < 4; ++v) {
      const __m256 values = _mm256_loadu_ps(x + 8 * v);
      most = _mm256_max_ps(most, _mm256_and_ps(values, magnitude));
      poison = _mm256_fmadd_ps(values, _mm256_setzero_ps(), poison);
    }
    const float largest = largest_of(most) + sum_of(poison);
    const __m256 inverse = _mm256_set1_ps(quantizer(127, largest));
    __m256i code[4];
    __m256i sum = _mm256_setzero_si256();
    for (int v = 0; v < 4; ++v) {
      const __m256 level = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * v), inverse);
      code[v] = _mm256_cvtps_epi32(_mm256_max_ps(level, _mm256_set1_ps(-127)));  // which a NaN becomes
      sum = _mm256_add_epi32(sum, code[v]);
    }
    // Packing works on halves of a register: the order is restored at the end.
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                        _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    scales[b] = largest / 127;
    sums[b] = sum_of(sum);
  }
}

}  // namespace

const Simd kAvx2 = {"avx2",
                    {scores_float<float>, scores_float<uint16_t>, avx2::scores_int8, avx2::scores_int4},
                    {values_float<float>, values_float<uint16_t>, avx2::values_int8, avx2::values_int4},
                    softmax,
                    swiglu,
                    quantize,
                    avx2::panel4,
                    avx2::panel8};

}  // namespace meki
