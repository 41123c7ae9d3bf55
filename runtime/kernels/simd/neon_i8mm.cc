#include "runtime/kernels/simd/neon_i8mm.h"

#include "runtime/kernels/simd/algorithms.h"

namespace meki {
namespace {

// 2P tokens against a panel. Sums are of 2 rows and 2 tokens: row 0 with either token, then row 1.
template <int P, WeightType kType>
void matrix_panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kBits = weight_bits(kType);
  constexpr int kGroups = weight_groups(kType);
  const size_t blocks = x.inputs / 32;
  float32x4_t total[4][P][2] = {};  // [4 rows][2 tokens][2 rows of these]
  for (size_t b = 0; b < blocks; ++b, panel += block_bytes(kType)) {
    int8x16_t xs[P][4];  // columns 8k .. 8k + 7 of 2 tokens
    int32x4_t excess[P];
    float32x4_t token_scale[P];
    float32x4_t token_sum[P];
    for (int p = 0; p < P; ++p) {
      const size_t token = first + 2 * p;
      const int8_t* const codes = x.codes + token * x.inputs + 32 * b;
      for (int k = 0; k < 4; ++k) xs[p][k] = vcombine_s8(vld1_s8(codes + 8 * k), vld1_s8(codes + x.inputs + 8 * k));
      const size_t at[2] = {token * blocks + b, (token + 1) * blocks + b};
      int32_t sums[2];
      for (int t = 0; t < 2; ++t) sums[t] = x.sums[2 * at[t]] + x.sums[2 * at[t] + 1];
      const int32_t both[4] = {sums[0], sums[1], sums[0], sums[1]};
      const float scales[4] = {x.scales[at[0]], x.scales[at[1]], x.scales[at[0]], x.scales[at[1]]};
      // Of nibbles; bytes become signed by themselves.
      excess[p] = vmulq_n_s32(vld1q_s32(both), kBits == 4 ? -code_offset(kType) : 0);
      token_scale[p] = vld1q_f32(scales);
      token_sum[p] = vmulq_f32(token_scale[p], vcvtq_f32_s32(vld1q_s32(both)));
    }
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + code_bytes(kType));
    for (int v = 0; v < 4; ++v) {
      const std::byte* const codes = panel + 16 * v;
      int32x4_t sum[P][2];
      const auto add = [&](const Code& rows, int k) {
        for (int p = 0; p < P; ++p) {
          for (int i = 0; i < 2; ++i) sum[p][i] = vmmlaq_s32(sum[p][i], rows.pair[i], xs[p][k]);
        }
      };
      const auto add_scaled = [&](const uint16_t* row, auto factor_of) {  // of 4 rows, to the totals
        const float32x4_t factors = load(row + 4 * v);
        const float32x4_t row_factor[2] = {vzip1q_f32(factors, factors), vzip2q_f32(factors, factors)};
        for (int p = 0; p < P; ++p) {
          for (int i = 0; i < 2; ++i) {
            total[v][p][i] = factor_of(total[v][p][i], row_factor[i], p, i);
          }
        }
      };
      for (int g = 0; g < kGroups; ++g) {
        for (int p = 0; p < P; ++p) sum[p][0] = sum[p][1] = excess[p];
        for (int i = kBits / kGroups * g; i < kBits / kGroups * (g + 1); i += 2) {
          const Bytes bytes = load_rows(codes + 64 * i, 64);
          if constexpr (kBits == 4) {
            add(low_nibbles(bytes), i / 2);
            add(high_nibbles(bytes), 2 + i / 2);
          } else {
            const int8x16_t sign = vdupq_n_s8(-128);  // code + 128 to code
            add(unpack<0>({veorq_s8(bytes.left, sign), veorq_s8(bytes.right, sign)}), i / 2);
          }
        }
        add_scaled(row_scales + 16 * g, [&](float32x4_t so_far, float32x4_t row_scale, int p, int i) {
          return vfmaq_f32(so_far, vcvtq_f32_s32(sum[p][i]), vmulq_f32(row_scale, token_scale[p]));
        });
      }
      if constexpr (has_minimum(kType)) {
        add_scaled(row_scales + 16 * kGroups, [&](float32x4_t so_far, float32x4_t minimum, int p, int) {
          return vfmaq_f32(so_far, minimum, token_sum[p]);
        });
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

template <WeightType kType>
void matrix_panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  for (; t + 8 <= x.tokens; t += 8) matrix_panel_tokens<4, kType>(panel, x, t, out, stride);
  for (; t + 2 <= x.tokens; t += 2) matrix_panel_tokens<1, kType>(panel, x, t, out, stride);
  if (t < x.tokens) panel_tokens<kType, 1>(panel, x, t, out, stride);
}

constexpr Simd::Panel kMatrixPanels[] = {nullptr,
                                         matrix_panel<WeightType::int8>,
                                         matrix_panel<WeightType::int4>,
                                         matrix_panel<WeightType::int4_minimum>,
                                         matrix_panel<WeightType::int8_minimum>,
                                         matrix_panel<WeightType::int8_16>};

}  // namespace

constinit const Simd kNeonI8mm = make_path("neon-i8mm", kMatrixPanels);

}  // namespace meki
