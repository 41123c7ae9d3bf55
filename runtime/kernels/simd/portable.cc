// The reference for all other paths: the definition of each function in plain loops.

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/base/half.h"
#include "runtime/kernels/rounding.h"
#include "runtime/kernels/simd/paths.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kGroup = KvLayout::kGroup;

float to_float(float value) { return value; }
float to_float(uint16_t half) { return half_to_float(half); }

template <class T>
void scores_float(const Queries& queries, const std::byte* block, float* scores) {
  const T* const keys = reinterpret_cast<const T*>(block);
  for (size_t q = 0; q < queries.count; ++q) {
    float* const row = scores + q * kBlock;
    std::fill_n(row, kBlock, 0.0F);
    for (size_t e = 0; e < queries.head_dim; ++e) {
      const float query = queries.values[q * queries.head_dim + e];
      for (size_t p = 0; p < kBlock; ++p) row[p] += query * to_float(keys[e * kBlock + p]);
    }
  }
}

template <class T>
void values_float(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs) {
  const T* const values = reinterpret_cast<const T*>(block);
  for (size_t q = 0; q < count; ++q) {
    for (size_t p = 0; p < kBlock; ++p) {
      for (size_t e = 0; e < head_dim; ++e) {
        outputs[q * head_dim + e] += weights[q * kBlock + p] * to_float(values[p * head_dim + e]);
      }
    }
  }
}

int32_t query_code(const Queries& queries, size_t q, size_t e) { return queries.codes[q * queries.head_dim + e]; }

void scores_int8(const Queries& queries, const std::byte* block, float* scores) {
  const auto* const scales = reinterpret_cast<const float*>(block);
  const auto* const codes = reinterpret_cast<const int8_t*>(scales + kBlock);
  for (size_t q = 0; q < queries.count; ++q) {
    for (size_t p = 0; p < kBlock; ++p) {
      int32_t sum = 0;
      for (size_t e = 0; e < queries.head_dim; ++e) {
        sum += query_code(queries, q, e) * codes[e / 4 * 4 * kBlock + p * 4 + e % 4];
      }
      scores[q * kBlock + p] = static_cast<float>(sum) * (scales[p] * queries.scales[q]);
    }
  }
}

int nibble(std::byte byte, bool high) { return (std::to_integer<int>(byte) >> (high ? 4 : 0) & 15) - 8; }

void scores_int4(const Queries& queries, const std::byte* block, float* scores) {
  const size_t groups = queries.head_dim / kGroup;
  const auto* const scales = reinterpret_cast<const uint16_t*>(block);
  const std::byte* const codes = block + groups * kBlock * sizeof(uint16_t);
  for (size_t q = 0; q < queries.count; ++q) {
    for (size_t p = 0; p < kBlock; ++p) {
      float total = 0;
      for (size_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (size_t i = 0; i < kGroup; ++i) {
          const std::byte byte = codes[(g * 4 + i % 16 / 4) * 4 * kBlock + p * 4 + i % 4];
          sum += query_code(queries, q, g * kGroup + i) * nibble(byte, i >= 16);
        }
        total += static_cast<float>(sum) * half_to_float(scales[g * kBlock + p]);
      }
      scores[q * kBlock + p] = total * queries.scales[q];
    }
  }
}

// weight * value scale in 8 bits: codes 0 .. 255 that are worth `unit` each.
float quantize_weights(const float* weights, const float* scales, int32_t* codes) {
  float scaled[kBlock];
  for (size_t p = 0; p < kBlock; ++p) scaled[p] = weights[p] * scales[p];
  const float largest = largest_magnitude(scaled, kBlock);
  const float inverse = quantizer(255, largest);
  for (size_t p = 0; p < kBlock; ++p) codes[p] = std::clamp(round_to_int(scaled[p] * inverse), 0, 255);
  return largest / 255;
}

void values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs) {
  const auto* const scales = reinterpret_cast<const float*>(block);
  const auto* const codes = reinterpret_cast<const int8_t*>(scales + kBlock);
  int32_t w[kBlock];
  for (size_t q = 0; q < count; ++q) {
    const float unit = quantize_weights(weights + q * kBlock, scales, w);
    for (size_t e = 0; e < head_dim; ++e) {
      int32_t sum = 0;
      for (size_t p = 0; p < kBlock; ++p) sum += w[p] * codes[p / 4 * 4 * head_dim + e * 4 + p % 4];
      outputs[q * head_dim + e] += static_cast<float>(sum) * unit;
    }
  }
}

void values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs) {
  const size_t groups = head_dim / kGroup;
  const auto* const halves = reinterpret_cast<const uint16_t*>(block);
  const std::byte* const codes = block + groups * kBlock * sizeof(uint16_t);
  float scales[kBlock];
  int32_t w[kBlock];
  for (size_t q = 0; q < count; ++q) {
    for (size_t g = 0; g < groups; ++g) {
      for (size_t p = 0; p < kBlock; ++p) scales[p] = half_to_float(halves[g * kBlock + p]);
      const float unit = quantize_weights(weights + q * kBlock, scales, w);
      for (size_t e = g * kGroup; e < (g + 1) * kGroup; ++e) {
        int32_t sum = 0;
        for (size_t p = 0; p < kBlock; ++p) {
          sum += w[p] * nibble(codes[p % 32 / 4 * 4 * head_dim + e * 4 + p % 4], p >= 32);
        }
        outputs[q * head_dim + e] += static_cast<float>(sum) * unit;
      }
    }
  }
}

void rotate(const float* x, size_t size, float factor, const float* weight, const float* cos, const float* sin,
            float scale, float* out) {
  const size_t half = size / 2;
  for (size_t i = 0; i < half; ++i) {
    const float a = weight == nullptr ? x[i] : x[i] * factor * weight[i];
    const float b = weight == nullptr ? x[half + i] : x[half + i] * factor * weight[half + i];
    out[i] = (a * cos[i] - b * sin[i]) * scale;
    out[half + i] = (b * cos[i] + a * sin[i]) * scale;
  }
}

void hadamard(float* values, size_t size) {
  const size_t run = size & (~size + 1);
  for (size_t stride = 1; stride < run; stride *= 2) {
    for (size_t i = 0; i < size; ++i) {
      if ((i & stride) != 0) continue;
      const float a = values[i];
      const float b = values[i + stride];
      values[i] = a + b;
      values[i + stride] = a - b;
    }
  }
  const float norm = 1 / std::sqrt(static_cast<float>(run));
  for (size_t i = 0; i < size; ++i) values[i] *= norm;
}

float quantize_head(const float* x, size_t size, int8_t* codes, int32_t* sums) {
  const float largest = largest_magnitude(x, size);
  const float inverse = quantizer(127, largest);
  if (sums != nullptr) std::fill_n(sums, size / 16, 0);
  for (size_t i = 0; i < size; ++i) {
    codes[i] = static_cast<int8_t>(std::clamp(round_to_int(x[i] * inverse), -127, 127));
    if (sums != nullptr) sums[i / 16] += codes[i];
  }
  return largest / 127;
}

void softmax(float* scores, float* maximum, float* sum, float* output, size_t head_dim) {
  float largest = *maximum;
  for (size_t p = 0; p < kBlock; ++p) largest = scores[p] > largest ? scores[p] : largest;
  if (largest == -std::numeric_limits<float>::infinity()) {  // nothing to see but, perhaps, NaN
    for (size_t p = 0; p < kBlock; ++p) {
      scores[p] = std::isnan(scores[p]) ? scores[p] : 0;
      *sum += scores[p];
    }
    return;
  }
  if (largest > *maximum) {
    const float shrink = std::exp(*maximum - largest);
    *sum *= shrink;
    for (size_t e = 0; e < head_dim; ++e) output[e] *= shrink;
    *maximum = largest;
  }
  for (size_t p = 0; p < kBlock; ++p) {
    scores[p] = std::exp(scores[p] - largest);
    *sum += scores[p];
  }
}

void swiglu(const float* gate, const float* up, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

void geglu(const float* gate, const float* up, size_t count, float* out) {
  constexpr float kSlope = 1.5957691216F;  // 2 sqrt(2 / pi): (1 + tanh(a / 2)) / 2 is 1 / (1 + e^-a)
  for (size_t i = 0; i < count; ++i) {
    const float x = gate[i];
    out[i] = x / (1 + std::exp(-kSlope * x * (1 + 0.044715F * x * x))) * up[i];
  }
}

void quantize(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* excess) {
  for (size_t b = 0; b < inputs / 32; ++b) {
    const float largest = largest_magnitude(x + b * 32, 32);
    const float inverse = quantizer(127, largest);
    scales[b] = largest / 127;
    excess[2 * b] = excess[2 * b + 1] = 0;
    for (size_t i = b * 32; i < (b + 1) * 32; ++i) {
      codes[i] = static_cast<int8_t>(std::clamp(round_to_int(x[i] * inverse), -127, 127));
      excess[2 * b] -= 8 * codes[i];
      if (i % 32 < 16) excess[2 * b + 1] -= 8 * codes[i];
    }
  }
}

template <WeightType kType>
void panel(const std::byte* panel, const Activations& x, float* out, size_t stride) {
  constexpr bool kNibbles = weight_bits(kType) == 4;
  constexpr size_t kGroupInputs = 32 / weight_groups(kType);
  const size_t blocks = x.inputs / 32;
  for (size_t t = 0; t < x.tokens; ++t) {
    float* const y = out + t * stride;
    std::fill_n(y, 16, 0.0F);
    for (size_t b = 0; b < blocks; ++b) {
      const std::byte* const codes = panel + b * block_bytes(kType);
      const auto* const scales = reinterpret_cast<const uint16_t*>(codes + code_bytes(kType));
      const int8_t* const xs = x.codes + t * x.inputs + b * 32;
      const float x_scale = x.scales[t * blocks + b];
      for (size_t r = 0; r < 16; ++r) {
        int32_t whole = 0;
        for (size_t g = 0; g < 32 / kGroupInputs; ++g) {
          int32_t sum = 0;
          for (size_t c = g * kGroupInputs; c < (g + 1) * kGroupInputs; ++c) {
            const int byte = std::to_integer<int>(codes[(kNibbles ? c % 16 : c) / 4 * 64 + r * 4 + c % 4]);
            const int code = kNibbles ? byte >> (c < 16 ? 0 : 4) & 15 : byte;
            sum += xs[c] * (code - code_offset(kType));
            whole += xs[c];
          }
          y[r] += static_cast<float>(sum) * (half_to_float(scales[16 * g + r]) * x_scale);
        }
        if (has_minimum(kType)) y[r] += half_to_float(scales[16 + r]) * (x_scale * static_cast<float>(whole));
      }
    }
  }
}

}  // namespace

const Simd kPortable = {"portable",
                        {scores_float<float>, scores_float<uint16_t>, scores_int8, scores_int4},
                        {values_float<float>, values_float<uint16_t>, values_int8, values_int4},
                        rotate,
                        hadamard,
                        quantize_head,
                        softmax,
                        swiglu,
                        geglu,
                        quantize,
                        {nullptr, panel<WeightType::int8>, panel<WeightType::int4>, panel<WeightType::int4_minimum>,
                         panel<WeightType::int8_minimum>, panel<WeightType::int8_16>}};

}  // namespace meki
