#include "runtime/kernels/simd/neon_i8mm.h"

#include "runtime/kernels/simd/algorithms.h"

namespace meki {
namespace {

// 2P tokens against a panel. Sums are of 2 rows and 2 tokens: row 0 with either token, then row 1.
template <int P, int kBits>
void matrix_panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kCodes = 64 * kBits;
  const size_t blocks = x.inputs / 32;
  float32x4_t total[4][P][2] = {};  // [4 rows][2 tokens][2 rows of these]
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
      const auto add = [&](const Code& rows, int k) {
        for (int p = 0; p < P; ++p) {
          for (int i = 0; i < 2; ++i) sum[p][i] = vmmlaq_s32(sum[p][i], rows.pair[i], xs[p][k]);
        }
      };
      for (int i = 0; i < kBits; i += 2) {
        const Bytes bytes = load_rows(codes + 64 * i, 64);
        if constexpr (kBits == 4) {
          add(low_nibbles(bytes), i / 2);
          add(high_nibbles(bytes), 2 + i / 2);
        } else {
          const int8x16_t sign = vdupq_n_s8(-128);  // code + 128 to code
          add(unpack<0>({veorq_s8(bytes.left, sign), veorq_s8(bytes.right, sign)}), i / 2);
        }
      }
      const float32x4_t scales = load(row_scales + 4 * v);
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
void matrix_panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  for (; t + 8 <= x.tokens; t += 8) matrix_panel_tokens<4, kBits>(panel, x, t, out, stride);
  for (; t + 2 <= x.tokens; t += 2) matrix_panel_tokens<1, kBits>(panel, x, t, out, stride);
  if (t < x.tokens) panel_tokens<kBits, 1>(panel, x, t, out, stride);
}

}  // namespace

constinit const Simd kNeonI8mm = make_path("neon-i8mm", matrix_panel<4>, matrix_panel<8>);

}  // namespace meki
