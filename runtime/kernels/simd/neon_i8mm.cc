// NEON with the 8-bit matrix products of ARMv8.6 (i8mm): vmmlaq_s32 multiplies 2 rows of 8 bytes by 2 rows of 8 bytes,
// twice what a dot product does. See neon.cc for what may not be in here.

#include "runtime/kernels/simd/neon_common.h"

namespace meki {
namespace {

// Two vectors of 4 rows x 4 columns, side by side, as operands of 2 rows x 8 columns.
struct RowPairs {
  int8x16_t pair[2];  // rows 0 and 1, rows 2 and 3

  RowPairs(int8x16_t left, int8x16_t right) {
    const int32x4_t a = vreinterpretq_s32_s8(left);
    const int32x4_t b = vreinterpretq_s32_s8(right);
    pair[0] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    pair[1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
  }
};

// Products of bytes (neon_common.h). The rows of one operand are two columns of the cache, those of the other the high
// and the low parts of a query's numbers.
struct MatrixProducts {
  template <int Q, int V>
  static void bytes(const std::byte* codes, size_t columns, size_t count, const Numbers (&numbers)[Q],
                    const std::byte* next, int32x4_t (&out)[Q][V]) {
    Sums<Q, V> sums;
    for (size_t k = 0; k < count; k += 8) {
      if (next != nullptr) {
        prefetch(next + k * columns, 16 * V);
        prefetch(next + (k + 4) * columns, 16 * V);
      }
      for (int v = 0; v < V; ++v) {
        const std::byte* const at = codes + k * columns + 16 * v;
        sums.add(v, {load(at), load(at + 4 * columns)}, numbers, k);
      }
    }
    sums.join(out);
  }
  template <int Q, int V>
  static void nibbles(const std::byte* codes, size_t columns, size_t count, const Numbers (&numbers)[Q],
                      const std::byte* next, int32x4_t (&out)[Q][V]) {
    Sums<Q, V> sums;
    for (size_t k = 0; k < count; k += 8) {
      if (next != nullptr) {
        prefetch(next + k * columns, 16 * V);
        prefetch(next + (k + 4) * columns, 16 * V);
      }
      for (int v = 0; v < V; ++v) {
        const std::byte* const at = codes + k * columns + 16 * v;
        const int8x16_t left = load(at);
        const int8x16_t right = load(at + 4 * columns);
        sums.add(v, {low_nibbles(left), low_nibbles(right)}, numbers, k);
        sums.add(v, {high_nibbles(left), high_nibbles(right)}, numbers, count + k);
      }
    }
    sums.join(out);
  }

 private:
  template <int Q, int V>
  struct Sums {
    int32x4_t sum[Q][V][2];  // of each pair of columns: high and low of one, high and low of the other

    Sums() {
      for (auto& row : sum) {
        for (auto& pair : row) pair[0] = pair[1] = vdupq_n_s32(0);
      }
    }
    void add(int v, const RowPairs& code, const Numbers (&numbers)[Q], size_t k) {
      for (int q = 0; q < Q; ++q) {
        const int8x16_t number = vcombine_s8(vld1_s8(numbers[q].high + k), vld1_s8(numbers[q].low + k));
        for (int i = 0; i < 2; ++i) sum[q][v][i] = vmmlaq_s32(sum[q][v][i], code.pair[i], number);
      }
    }
    void join(int32x4_t (&out)[Q][V]) const {
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) {
          const int32x4_t high = vuzp1q_s32(sum[q][v][0], sum[q][v][1]);
          const int32x4_t low = vuzp2q_s32(sum[q][v][0], sum[q][v][1]);
          out[q][v] = vaddq_s32(vshlq_n_s32(high, 7), low);
        }
      }
    }
  };
};

// 2P tokens against a panel. Sums are of 2 rows and 2 tokens: row 0 with either token, then row 1.
template <int P, int kBits>
void panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kCodes = 64 * kBits;
  const size_t blocks = x.inputs / 32;
  float32x4_t total[4][P][2];  // [4 rows][2 tokens][2 rows of these]
  for (auto& rows : total) {
    for (auto& pair : rows) pair[0] = pair[1] = vdupq_n_f32(0);
  }
  for (size_t b = 0; b < blocks; ++b, panel += kCodes + 32) {
    int8x16_t xs[P][4];  // columns 8k .. 8k + 7 of 2 tokens
    int32x4_t excess[P];
    float32x4_t token_scale[P];
    for (int p = 0; p < P; ++p) {
      const size_t token = first + 2 * p;
      const int8_t* const codes = x.codes + token * x.inputs + 32 * b;
      for (int k = 0; k < 4; ++k) xs[p][k] = vcombine_s8(vld1_s8(codes + 8 * k), vld1_s8(codes + x.inputs + 8 * k));
      const size_t at = token * blocks + b;
      const int32_t sums[4] = {x.sums[at], x.sums[at + blocks], x.sums[at], x.sums[at + blocks]};
      const float scales[4] = {x.scales[at], x.scales[at + blocks], x.scales[at], x.scales[at + blocks]};
      // Nibbles are code + 8; bytes become signed by themselves.
      excess[p] = vmulq_n_s32(vld1q_s32(sums), kBits == 4 ? -8 : 0);
      token_scale[p] = vld1q_f32(scales);
    }
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + kCodes);
    for (int v = 0; v < 4; ++v) {
      const std::byte* const codes = panel + 16 * v;
      int32x4_t sum[P][2];
      for (int p = 0; p < P; ++p) sum[p][0] = sum[p][1] = excess[p];
      const auto add = [&](const RowPairs& rows, int k) {
        for (int p = 0; p < P; ++p) {
          for (int i = 0; i < 2; ++i) sum[p][i] = vmmlaq_s32(sum[p][i], rows.pair[i], xs[p][k]);
        }
      };
      for (int i = 0; i < kBits; i += 2) {
        const int8x16_t left = load(codes + 64 * i);
        const int8x16_t right = load(codes + 64 * i + 64);
        if constexpr (kBits == 4) {
          add({low_nibbles(left), low_nibbles(right)}, i / 2);
          add({high_nibbles(left), high_nibbles(right)}, 2 + i / 2);
        } else {
          const int8x16_t sign = vdupq_n_s8(-128);  // code + 128 to code
          add({veorq_s8(left, sign), veorq_s8(right, sign)}, i / 2);
        }
      }
      const float32x4_t scales = load_floats(row_scales + 4 * v);
      const float32x4_t row_scale[2] = {vzip1q_f32(scales, scales), vzip2q_f32(scales, scales)};
      for (int p = 0; p < P; ++p) {
        for (int i = 0; i < 2; ++i) {
          const float32x4_t scale = vmulq_f32(row_scale[i], token_scale[p]);
          total[v][p][i] = vfmaq_f32(total[v][p][i], vcvtq_f32_s32(sum[p][i]), scale);
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < 4; ++v) {
      float* const at = out + (first + 2 * p) * stride + 4 * v;
      vst1q_f32(at, vuzp1q_f32(total[v][p][0], total[v][p][1]));
      vst1q_f32(at + stride, vuzp2q_f32(total[v][p][0], total[v][p][1]));
    }
  }
}

template <int kBits>
void panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  for (; t + 8 <= x.tokens; t += 8) panel_tokens<4, kBits>(panel, x, t, out, stride);
  for (; t + 2 <= x.tokens; t += 2) panel_tokens<1, kBits>(panel, x, t, out, stride);
  if (t == x.tokens) return;
  const size_t blocks = x.inputs / 32;
  const Activations last{1, x.inputs, x.codes + t * x.inputs, x.scales + t * blocks, x.sums + t * blocks};
  (kBits == 4 ? neon::panel4 : neon::panel8)(panel, last, out + t * stride, stride);
}

}  // namespace

using Matrix = IntegerCache<MatrixProducts>;

const Simd kNeonI8mm = {"neon-i8mm",
                        {neon::scores_float32, neon::scores_float16, Matrix::scores_int8, Matrix::scores_int4},
                        {neon::values_float32, neon::values_float16, Matrix::values_int8, Matrix::values_int4},
                        neon::softmax,
                        neon::swiglu,
                        neon::quantize,
                        panel<4>,
                        panel<8>};

}  // namespace meki
