// NEON with the dot products of ARMv8.2. Compiled with those instructions enabled: nothing but intrinsics and what is
// local to this file may be instantiated here, or another file's copy of a shared inline function could be replaced by
// one that not every CPU runs.

#include "runtime/kernels/simd/neon_common.h"

namespace meki {
namespace {

// sum[q][v] += sum over k of numbers[q][k] * rows[k][4v .. 4v + 3], for `count` rows of `columns` elements.
template <int Q, int V, class T>
void add_products(const T* rows, size_t columns, size_t count, const float* numbers, size_t stride,
                  const std::byte* next, float32x4_t (&sum)[Q][V]) {
  for (size_t k = 0; k < count; ++k) {
    if (next != nullptr) prefetch(next + k * columns * sizeof(T), 4 * V * sizeof(T));
    for (int v = 0; v < V; ++v) {
      const float32x4_t row = load_floats(rows + k * columns + 4 * v);
      for (int q = 0; q < Q; ++q) sum[q][v] = vfmaq_n_f32(sum[q][v], row, numbers[q * stride + k]);
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
    constexpr int V = 2 * kVectors<Q>;
    const size_t head_dim = queries.head_dim;
    for (size_t p = 0; p < kBlock; p += 4 * V) {
      float32x4_t sum[Q][V];
      for (auto& row : sum) {
        for (float32x4_t& vector : row) vector = vdupq_n_f32(0);
      }
      add_products(keys + p, kBlock, head_dim, queries.values + first * head_dim, head_dim,
                   first == 0 && next != nullptr ? next + p * sizeof(T) : nullptr, sum);
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) vst1q_f32(scores + (first + q) * kBlock + p + 4 * v, sum[q][v]);
      }
    }
  }
};

template <class T>
struct FloatValues {
  const float* weights;
  size_t head_dim;
  const T* values;
  const std::byte* next;
  float* outputs;

  template <int Q>
  void run(size_t first) const {
    constexpr int V = 2 * kVectors<Q>;
    size_t e = 0;
    for (; e + 4 * V <= head_dim; e += 4 * V) columns<Q, V>(first, e);
    for (; e < head_dim; e += 16) columns<Q, 4>(first, e);
  }
  template <int Q, int V>
  void columns(size_t first, size_t e) const {
    float* const out = outputs + first * head_dim + e;
    float32x4_t sum[Q][V];
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) sum[q][v] = vld1q_f32(out + q * head_dim + 4 * v);
    }
    add_products(values + e, head_dim, kBlock, weights + first * kBlock, kBlock,
                 first == 0 && next != nullptr ? next + e * sizeof(T) : nullptr, sum);
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) vst1q_f32(out + q * head_dim + 4 * v, sum[q][v]);
    }
  }
};

// Products of bytes (neon_common.h): vdotq_s32 adds up 4 of them in every lane.
struct DotProducts {
  template <int Q, int V>
  static void bytes(const std::byte* codes, size_t columns, size_t count, const Numbers (&numbers)[Q],
                    const std::byte* next, int32x4_t (&out)[Q][V]) {
    Sums<Q, V> sums;
    for (size_t k = 0; k < count; k += 4) {
      if (next != nullptr) prefetch(next + k * columns, 16 * V);
      int8x16_t code[V];
      for (int v = 0; v < V; ++v) code[v] = load(codes + k * columns + 16 * v);
      sums.add(code, numbers, k);
    }
    sums.join(out);
  }
  template <int Q, int V>
  static void nibbles(const std::byte* codes, size_t columns, size_t count, const Numbers (&numbers)[Q],
                      const std::byte* next, int32x4_t (&out)[Q][V]) {
    Sums<Q, V> sums;
    for (size_t k = 0; k < count; k += 4) {
      if (next != nullptr) prefetch(next + k * columns, 16 * V);
      int8x16_t low[V];
      int8x16_t high[V];
      for (int v = 0; v < V; ++v) {
        const int8x16_t pair = load(codes + k * columns + 16 * v);
        low[v] = low_nibbles(pair);
        high[v] = high_nibbles(pair);
      }
      sums.add(low, numbers, k);
      sums.add(high, numbers, count + k);
    }
    sums.join(out);
  }

 private:
  template <int Q, int V>
  struct Sums {
    int32x4_t high[Q][V];
    int32x4_t low[Q][V];

    Sums() {
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) high[q][v] = low[q][v] = vdupq_n_s32(0);
      }
    }
    void add(const int8x16_t (&code)[V], const Numbers (&numbers)[Q], size_t k) {
      for (int q = 0; q < Q; ++q) {
        const int8x16_t h = broadcast4(numbers[q].high + k);
        const int8x16_t l = broadcast4(numbers[q].low + k);
        for (int v = 0; v < V; ++v) {
          high[q][v] = vdotq_s32(high[q][v], code[v], h);
          low[q][v] = vdotq_s32(low[q][v], code[v], l);
        }
      }
    }
    void join(int32x4_t (&out)[Q][V]) const {
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) out[q][v] = vaddq_s32(vshlq_n_s32(high[q][v], 7), low[q][v]);
      }
    }
  };
};

// e^x for x <= 0; 0 for -inf. Cephes-style range reduction with a degree 6 minimax polynomial: within 1 ulp.
float32x4_t exp_negative(float32x4_t x) {
  x = vmaxq_f32(x, vdupq_n_f32(-104.0F));  // e^-104 rounds to 0; a NaN stays one
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504F));
  float32x4_t r = vfmsq_n_f32(x, n, 0.693359375F);
  r = vfmsq_n_f32(r, n, -2.12194440e-4F);
  float32x4_t p = vdupq_n_f32(0.0013814467F);
  p = vfmaq_f32(vdupq_n_f32(0.0083687808F), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.041668393F), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.16666520F), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.49999994F), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0F), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0F), p, r);
  // 2^n in two factors that are normal numbers.
  const int32x4_t whole = vcvtq_s32_f32(n);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  return vmulq_f32(vmulq_f32(p, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}

}  // namespace

void neon::scores_float32(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries(queries.count, FloatScores<float>{queries, reinterpret_cast<const float*>(block), next, scores});
}

void neon::scores_float16(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
  for_queries(queries.count, FloatScores<uint16_t>{queries, reinterpret_cast<const uint16_t*>(block), next, scores});
}

void neon::values_float32(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                          const std::byte* next, float* outputs) {
  for_queries(count, FloatValues<float>{weights, head_dim, reinterpret_cast<const float*>(block), next, outputs});
}

void neon::values_float16(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                          const std::byte* next, float* outputs) {
  for_queries(count, FloatValues<uint16_t>{weights, head_dim, reinterpret_cast<const uint16_t*>(block), next, outputs});
}

void neon::softmax(float* scores, float* maximum, float* sum, float* output, size_t head_dim) {
  float32x4_t score[16];
  for (int v = 0; v < 16; ++v) score[v] = vld1q_f32(scores + 4 * v);
  float32x4_t most = score[0];
  for (int v = 1; v < 16; ++v) most = vmaxnmq_f32(most, score[v]);  // passes over NaN
  const float block_max = vmaxnmvq_f32(most);
  const float largest = block_max > *maximum ? block_max : *maximum;
  float32x4_t total = vdupq_n_f32(0);
  if (largest == -__builtin_inff()) {  // nothing to see but, perhaps, NaN
    for (int v = 0; v < 16; ++v) {
      const float32x4_t weight = vbslq_f32(vceqq_f32(score[v], score[v]), vdupq_n_f32(0), score[v]);
      total = vaddq_f32(total, weight);
      vst1q_f32(scores + 4 * v, weight);
    }
    *sum += vaddvq_f32(total);
    return;
  }
  if (largest > *maximum) {
    const float shrink = vgetq_lane_f32(exp_negative(vdupq_n_f32(*maximum - largest)), 0);
    *sum *= shrink;
    for (size_t e = 0; e < head_dim; e += 4) vst1q_f32(output + e, vmulq_n_f32(vld1q_f32(output + e), shrink));
    *maximum = largest;
  }
  for (int v = 0; v < 16; ++v) {
    const float32x4_t weight = exp_negative(vsubq_f32(score[v], vdupq_n_f32(largest)));
    total = vaddq_f32(total, weight);
    vst1q_f32(scores + 4 * v, weight);
  }
  *sum += vaddvq_f32(total);
}

void neon::swiglu(const float* gate, const float* up, size_t count, float* out) {
  const float32x4_t one = vdupq_n_f32(1);
  for (size_t i = 0; i < count; i += 4) {
    const float32x4_t x = vld1q_f32(gate + i);
    const float32x4_t e = exp_negative(vnegq_f32(vabsq_f32(x)));
    // sigmoid(x): 1 / (1 + e) for x >= 0, e / (1 + e) otherwise, and nothing overflows.
    const float32x4_t sigmoid = vdivq_f32(vbslq_f32(vcltzq_f32(x), e, one), vaddq_f32(one, e));
    vst1q_f32(out + i, vmulq_f32(vmulq_f32(x, sigmoid), vld1q_f32(up + i)));
  }
}

using Dot = IntegerCache<DotProducts>;

const Simd kNeonDotprod = {"neon-dotprod",
                           {neon::scores_float32, neon::scores_float16, Dot::scores_int8, Dot::scores_int4},
                           {neon::values_float32, neon::values_float16, Dot::values_int8, Dot::values_int4},
                           neon::softmax,
                           neon::swiglu,
                           neon::quantize,
                           neon::panel4,
                           neon::panel8};

}  // namespace meki
