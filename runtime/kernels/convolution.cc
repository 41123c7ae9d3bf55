#include "runtime/kernels/convolution.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "runtime/base/half.h"
#include "runtime/kernels/each_token.h"
#include "runtime/kernels/norm.h"

namespace meki {
namespace {

float load(float value) { return value; }
float load(uint16_t half) { return half_to_float(half); }
void store(float value, float& to) { to = value; }
void store(float value, uint16_t& to) { to = float_to_half(value); }

// T: of the cache.
template <class T>
void convolve_as(const ConvolutionArgs& args, const Parallel& parallel) {
  const size_t channels = args.channels;
  T* const cache = reinterpret_cast<T*>(args.cache);
  each_token(args.tokens, parallel, [&](size_t t) {
    const float* const x = args.x + t * channels;
    T* const kept = cache + (args.past + t) * channels;
    const float inverse = inverse_rms(x, channels, args.epsilon);
    for (size_t i = 0; i < channels; ++i) store(x[i] * inverse * args.norm_weight[i], kept[i]);
  });
  each_token(args.tokens, parallel, [&](size_t t) {
    const float* const x = args.x + t * channels;
    float* const out = args.out + t * channels;
    std::fill_n(out, channels, 0.0F);
    for (size_t tap = 0; tap < args.kernel; ++tap) {
      const size_t back = (args.kernel - 1 - tap) * args.dilation;
      if (back > args.past + t) continue;
      const T* const seen = cache + (args.past + t - back) * channels;
      const float* const weight = args.weight + tap * channels;
      for (size_t i = 0; i < channels; ++i) out[i] += weight[i] * load(seen[i]);
    }
    for (size_t i = 0; i < channels; ++i) out[i] = x[i] + out[i] / (1 + std::exp(-out[i]));
  });
}

}  // namespace

void convolve(const ConvolutionArgs& args, const Parallel& parallel) {
  if (convolution_bytes(args.kv_type) == sizeof(float)) {
    convolve_as<float>(args, parallel);
  } else {
    convolve_as<uint16_t>(args, parallel);
  }
}

}  // namespace meki
