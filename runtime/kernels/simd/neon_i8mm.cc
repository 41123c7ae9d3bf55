// Linear layers of several tokens by the 8-bit matrix products of ARMv8.6 (i8mm): vmmlaq_s32 multiplies 2 rows of 8
// bytes by 2 rows of 8 bytes, twice what a dot product does.

// clang-format off: the vectors, then the algorithms over them
#include "runtime/kernels/simd/neon.h"
#include "runtime/kernels/simd/algorithms.h"
// clang-format on

namespace meki {
namespace {

// 4 rows x 8 columns as operands of 2 rows x 8 columns: rows 0 and 1, rows 2 and 3.
struct RowPairs {
  int8x16_t pair[2];

  // Of two vectors of 4 rows x 4 columns, side by side.
  RowPairs(int8x16_t left, int8x16_t right) {
    const int32x4_t a = vreinterpretq_s32_s8(left);
    const int32x4_t b = vreinterpretq_s32_s8(right);
    pair[0] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    pair[1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
  }
};

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
      const int32_t both[4] = {x.excess[2 * at[0]], x.excess[2 * at[1]], x.excess[2 * at[0]], x.excess[2 * at[1]]};
      const float scales[4] = {x.scales[at[0]], x.scales[at[1]], x.scales[at[0]], x.scales[at[1]]};
      // Of nibbles; bytes become signed by themselves.
      excess[p] = code_offset(kType) == 8 ? vld1q_s32(both) : vdupq_n_s32(0);
      token_scale[p] = vld1q_f32(scales);
      token_sum[p] = vmulq_f32(vmulq_n_f32(token_scale[p], -0.125F), vcvtq_f32_s32(vld1q_s32(both)));
    }
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + code_bytes(kType));
    for (int v = 0; v < 4; ++v) {
      const std::byte* const codes = panel + 16 * v;
      int32x4_t sum[P][2];
      const auto add = [&](const RowPairs& rows, int k) {
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
          const int8x16_t left = load_bytes(codes + 64 * i);
          const int8x16_t right = load_bytes(codes + 64 * (i + 1));
          if constexpr (kBits == 4) {
            add({low_nibbles(left), low_nibbles(right)}, i / 2);
            add({high_nibbles(left), high_nibbles(right)}, 2 + i / 2);
          } else {
            const int8x16_t sign = vdupq_n_s8(-128);  // code + 128 to code
            add({veorq_s8(left, sign), veorq_s8(right, sign)}, i / 2);
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
