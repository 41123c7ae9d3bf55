// The linear layers of the NEON paths; see neon.cc for what may not be in here.

#include "runtime/kernels/simd/neon_common.h"

namespace meki {
namespace {

// T tokens against a panel, whose block has kBits / 4 * 4 vectors for each 4 of its 16 rows.
template <int T, int kBits>
void panel_tokens(const std::byte* panel, const Activations& x, size_t first, float* out, size_t stride) {
  constexpr int kCodes = 64 * kBits;
  const size_t blocks = x.inputs / 32;
  float32x4_t total[T][4];
  for (auto& row : total) {
    for (float32x4_t& vector : row) vector = vdupq_n_f32(0);
  }
  for (size_t b = 0; b < blocks; ++b, panel += kCodes + 32) {
    if constexpr (T == 1) prefetch(panel + 4096, kCodes + 32);  // decode: bound by memory
    const int8_t* const xs = x.codes + first * x.inputs + 32 * b;
    const auto* const row_scales = reinterpret_cast<const uint16_t*>(panel + kCodes);
    for (int pair = 0; pair < 4; pair += 2) {  // of vectors: what the registers hold
      int32x4_t sum[T][2];
      for (int t = 0; t < T; ++t) {
        // Nibbles are code + 8; bytes become signed by themselves.
        const int32_t excess = kBits == 4 ? 8 * x.sums[(first + t) * blocks + b] : 0;
        sum[t][0] = sum[t][1] = vdupq_n_s32(-excess);
      }
      for (int i = 0; i < kBits; ++i) {
        for (int v = 0; v < 2; ++v) {
          const int8x16_t bytes = load(panel + 64 * i + 16 * (pair + v));
          if constexpr (kBits == 4) {
            const int8x16_t low = low_nibbles(bytes);
            const int8x16_t high = high_nibbles(bytes);
            for (int t = 0; t < T; ++t) {
              sum[t][v] = vdotq_s32(sum[t][v], low, broadcast4(xs + t * x.inputs + 4 * i));
              sum[t][v] = vdotq_s32(sum[t][v], high, broadcast4(xs + t * x.inputs + 16 + 4 * i));
            }
          } else {
            const int8x16_t rows = veorq_s8(bytes, vdupq_n_s8(-128));  // code + 128 to code
            for (int t = 0; t < T; ++t) sum[t][v] = vdotq_s32(sum[t][v], rows, broadcast4(xs + t * x.inputs + 4 * i));
          }
        }
      }
      for (int v = 0; v < 2; ++v) {
        const float32x4_t row_scale = load_floats(row_scales + 4 * (pair + v));
        for (int t = 0; t < T; ++t) {
          const float32x4_t scale = vmulq_n_f32(row_scale, x.scales[(first + t) * blocks + b]);
          float32x4_t& sums = total[t][pair + v];
          sums = vfmaq_f32(sums, vcvtq_f32_s32(sum[t][v]), scale);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < 4; ++v) vst1q_f32(out + (first + t) * stride + 4 * v, total[t][v]);
  }
}

template <int kBits>
void panel_all(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  size_t t = 0;
  for (; t + 4 <= x.tokens; t += 4) panel_tokens<4, kBits>(panel, x, t, out, stride);
  for (; t < x.tokens; ++t) panel_tokens<1, kBits>(panel, x, t, out, stride);
}

}  // namespace

void neon::quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* sums) {
  for (size_t b = 0; b < inputs / 32; ++b, x += 32, codes += 32) {
    float32x4_t most = vdupq_n_f32(0);
    for (int v = 0; v < 8; ++v) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + 4 * v)));  // of NaN is NaN
    const float largest = vmaxvq_f32(most);
    const float inverse = quantizer(127, largest);
    int32x4_t sum = vdupq_n_s32(0);
    for (int v = 0; v < 8; v += 2) {
      const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * v), inverse));
      const int32x4_t second = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * v + 4), inverse));
      sum = vaddq_s32(sum, vaddq_s32(first, second));
      vst1_s8(codes + 4 * v, vqmovn_s16(vcombine_s16(vqmovn_s32(first), vqmovn_s32(second))));
    }
    scales[b] = largest / 127;  // infinite if x is: 0 times it is NaN
    sums[b] = vaddvq_s32(sum);
  }
}

void neon::panel4(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  panel_all<4>(panel, x, out, stride);
}

void neon::panel8(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  panel_all<8>(panel, x, out, stride);
}

}  // namespace meki
