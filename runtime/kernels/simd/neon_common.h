#pragma once

// What the NEON files share. All of it is local to the file that includes it: compiled with more than baseline
// instructions enabled, it must not be merged with anybody else's copy.

#include <arm_neon.h>

#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace neon {

// Members of kNeonDotprod that kNeonI8mm has, too.
void scores_float32(const Queries& queries, const std::byte* block, const std::byte* next, float* scores);
void scores_float16(const Queries& queries, const std::byte* block, const std::byte* next, float* scores);
void values_float32(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                    float* outputs);
void values_float16(const float* weights, size_t count, size_t head_dim, const std::byte* block, const std::byte* next,
                    float* outputs);
void softmax(float* scores, float* maximum, float* sum, float* output, size_t head_dim);
void swiglu(const float* gate, const float* up, size_t count, float* out);
void quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* sums);
// For any number of tokens.
void panel4(const std::byte* panel, const Activations& x, float* out, size_t stride);
void panel8(const std::byte* panel, const Activations& x, float* out, size_t stride);

}  // namespace neon

namespace {

constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kGroup = KvLayout::kGroup;

inline int8x16_t load(const std::byte* at) { return vld1q_s8(reinterpret_cast<const int8_t*>(at)); }
inline float32x4_t load_floats(const float* at) { return vld1q_f32(at); }
inline float32x4_t load_floats(const uint16_t* at) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at))); }

// The lines of the next `bytes` bytes.
inline void prefetch(const std::byte* at, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
}

// 4 neighbouring bytes in every lane.
inline int8x16_t broadcast4(const int8_t* at) {
  int32_t word;
  __builtin_memcpy(&word, at, sizeof(word));
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

inline int8x16_t low_nibbles(int8x16_t bytes) { return vandq_s8(bytes, vdupq_n_s8(15)); }
inline int8x16_t high_nibbles(int8x16_t bytes) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(bytes), 4));
}

// As in rounding.h.
inline float quantizer(float levels, float largest) { return largest > 1e-30F ? levels / largest : 0; }

// Calls tile.template run<Q>(first) for queries first .. first + Q - 1. A tile of Q queries takes kVectors<Q> vectors
// of four positions or elements at a time: what the registers hold.
template <class Tile>
void for_queries(size_t count, Tile tile) {
  size_t q = 0;
  for (; q + 4 <= count; q += 4) tile.template run<4>(q);
  for (; q + 2 <= count; q += 2) tile.template run<2>(q);
  for (; q < count; ++q) tile.template run<1>(q);
}
template <int Q>
constexpr int kVectors = 8 / Q;

// What bytes of the cache are multiplied by: 128 * high + low.
struct Numbers {
  const int8_t* high;
  const int8_t* low;
};

// The integer types of the cache, for any Products with
//
//   template <int Q, int V>
//   static void bytes(const std::byte* codes, size_t columns, size_t count, const Numbers (&numbers)[Q],
//                     const std::byte* next, int32x4_t (&out)[Q][V]);
//   template <int Q, int V>
//   static void nibbles(...);  // the same
//
// out[q][v] = sum over k of numbers[q][k] * code k of columns 4v .. 4v + 3. Codes are int8 [count / 4][columns][4]; of
// nibbles there are 2 * count, 0 to 15: low ones first. `count` is a multiple of 16. Nibbles are code + 8.
template <class Products>
struct IntegerCache {
  struct Int8Scores {
    const Queries& queries;
    const std::byte* block;
    const std::byte* next;
    float* scores;

    template <int Q>
    void run(size_t first) const {
      constexpr int V = kVectors<Q>;
      const size_t head_dim = queries.head_dim;
      const auto* const scales = reinterpret_cast<const float*>(block);
      const bool fetch = first == 0 && next != nullptr;
      Numbers numbers[Q];
      for (int q = 0; q < Q; ++q) numbers[q] = numbers_of(queries, first + q);
      for (size_t p = 0; p < kBlock; p += 4 * V) {
        int32x4_t sum[Q][V];
        Products::template bytes<Q, V>(block + kBlock * sizeof(float) + 4 * p, kBlock, head_dim, numbers,
                                       fetch ? next + kBlock * sizeof(float) + 4 * p : nullptr, sum);
        for (int q = 0; q < Q; ++q) {
          for (int v = 0; v < V; ++v) {
            const float32x4_t scale = vmulq_n_f32(vld1q_f32(scales + p + 4 * v), queries.scales[first + q]);
            vst1q_f32(scores + (first + q) * kBlock + p + 4 * v, vmulq_f32(vcvtq_f32_s32(sum[q][v]), scale));
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
      constexpr int V = kVectors<Q>;
      const size_t head_dim = queries.head_dim;
      const size_t groups = head_dim / kGroup;
      const auto* const scales = reinterpret_cast<const uint16_t*>(block);
      const bool fetch = first == 0 && next != nullptr;
      for (size_t p = 0; p < kBlock; p += 4 * V) {
        float32x4_t total[Q][V];
        for (auto& row : total) {
          for (float32x4_t& vector : row) vector = vdupq_n_f32(0);
        }
        for (size_t g = 0; g < groups; ++g) {
          const size_t at = groups * kBlock * sizeof(uint16_t) + g * kGroup / 2 * kBlock + 4 * p;
          Numbers numbers[Q];
          for (int q = 0; q < Q; ++q) {
            const Numbers query = numbers_of(queries, first + q);
            numbers[q] = {query.high + g * kGroup, query.low + g * kGroup};
          }
          int32x4_t sum[Q][V];
          Products::template nibbles<Q, V>(block + at, kBlock, kGroup / 2, numbers, fetch ? next + at : nullptr, sum);
          for (int q = 0; q < Q; ++q) {
            const int32_t* const sums = queries.sums + (first + q) * (head_dim / 16) + 2 * g;
            const int32x4_t excess = vdupq_n_s32(8 * (sums[0] + sums[1]));
            for (int v = 0; v < V; ++v) {
              const float32x4_t scale = load_floats(scales + g * kBlock + p + 4 * v);
              total[q][v] = vfmaq_f32(total[q][v], vcvtq_f32_s32(vsubq_s32(sum[q][v], excess)), scale);
            }
          }
        }
        for (int q = 0; q < Q; ++q) {
          for (int v = 0; v < V; ++v) {
            vst1q_f32(scores + (first + q) * kBlock + p + 4 * v, vmulq_n_f32(total[q][v], queries.scales[first + q]));
          }
        }
      }
    }
  };

  // Weights of one query in 14 bits: unit * (128 * high + low).
  struct WeightCodes {
    int8_t high[kBlock];
    int8_t low[kBlock];
    float unit;
    int32_t sum;
  };

  template <class T>
  static void quantize_weights(const float* weights, const T* scales, WeightCodes& out) {
    float32x4_t scaled[16];
    float32x4_t most = vdupq_n_f32(0);
    for (int v = 0; v < 16; ++v) {
      scaled[v] = vmulq_f32(vld1q_f32(weights + 4 * v), load_floats(scales + 4 * v));
      most = vmaxq_f32(most, scaled[v]);  // of NaN is NaN
    }
    const float largest = vmaxvq_f32(most);
    const float inverse = quantizer(16383, largest);
    int32x4_t sum = vdupq_n_s32(0);
    for (int v = 0; v < 16; v += 2) {
      int32x4_t code[2];
      for (int i = 0; i < 2; ++i) {
        const int32x4_t rounded = vcvtnq_s32_f32(vmulq_n_f32(scaled[v + i], inverse));
        code[i] = vmaxq_s32(vminq_s32(rounded, vdupq_n_s32(16383)), vdupq_n_s32(0));
        sum = vaddq_s32(sum, code[i]);
      }
      const int16x8_t codes = vcombine_s16(vmovn_s32(code[0]), vmovn_s32(code[1]));
      vst1_s8(out.high + 4 * v, vshrn_n_s16(codes, 7));
      vst1_s8(out.low + 4 * v, vmovn_s16(vandq_s16(codes, vdupq_n_s16(127))));
    }
    out.unit = largest / 16383;
    out.sum = vaddvq_s32(sum);
  }

  // out[q][e .. e + 4V - 1] += sum * unit.
  template <int Q, int V>
  static void add_scaled(const int32x4_t (&sum)[Q][V], const WeightCodes (&w)[Q], float* out, size_t head_dim) {
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) {
        float* const at = out + q * head_dim + 4 * v;
        vst1q_f32(at, vfmaq_n_f32(vld1q_f32(at), vcvtq_f32_s32(sum[q][v]), w[q].unit));
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
      for (; e + 4 * kVectors<Q> <= head_dim; e += 4 * kVectors<Q>) columns<Q, kVectors<Q>>(first, e, w);
      for (; e < head_dim; e += 8) columns<Q, 2>(first, e, w);
    }
    template <int Q, int V>
    void columns(size_t first, size_t e, const WeightCodes (&w)[Q]) const {
      const size_t at = kBlock * sizeof(float) + 4 * e;
      Numbers numbers[Q];
      for (int q = 0; q < Q; ++q) numbers[q] = {w[q].high, w[q].low};
      int32x4_t sum[Q][V];
      Products::template bytes<Q, V>(block + at, head_dim, kBlock, numbers,
                                     first == 0 && next != nullptr ? next + at : nullptr, sum);
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
      constexpr int V = kVectors<Q>;  // a group has 8
      for (size_t g = 0; g < head_dim / kGroup; ++g) {
        WeightCodes w[Q];
        Numbers numbers[Q];
        for (int q = 0; q < Q; ++q) {
          const auto* const scales = reinterpret_cast<const uint16_t*>(block) + g * kBlock;
          quantize_weights(weights + (first + q) * kBlock, scales, w[q]);
          numbers[q] = {w[q].high, w[q].low};
        }
        for (size_t e = g * kGroup; e < (g + 1) * kGroup; e += 4 * V) {
          const size_t at = head_dim / kGroup * kBlock * sizeof(uint16_t) + 4 * e;
          int32x4_t sum[Q][V];
          Products::template nibbles<Q, V>(block + at, head_dim, kBlock / 2, numbers,
                                           first == 0 && next != nullptr ? next + at : nullptr, sum);
          for (int q = 0; q < Q; ++q) {
            for (int v = 0; v < V; ++v) sum[q][v] = vsubq_s32(sum[q][v], vdupq_n_s32(8 * w[q].sum));
          }
          add_scaled(sum, w, outputs + first * head_dim + e, head_dim);
        }
      }
    }
  };

  static Numbers numbers_of(const Queries& queries, size_t query) {
    return {queries.high + query * queries.head_dim, queries.low + query * queries.head_dim};
  }

  // Members of Simd.
  static void scores_int8(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
    for_queries(queries.count, Int8Scores{queries, block, next, scores});
  }
  static void scores_int4(const Queries& queries, const std::byte* block, const std::byte* next, float* scores) {
    for_queries(queries.count, Int4Scores{queries, block, next, scores});
  }
  static void values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                          const std::byte* next, float* outputs) {
    for_queries(count, Int8Values{weights, head_dim, block, next, outputs});
  }
  static void values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block,
                          const std::byte* next, float* outputs) {
    for_queries(count, Int4Values{weights, head_dim, block, next, outputs});
  }
};

}  // namespace
}  // namespace meki
