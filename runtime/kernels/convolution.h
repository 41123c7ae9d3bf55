#pragma once

#include <cstddef>

#include "runtime/base/parallel.h"
#include "runtime/kernels/kv_cache.h"

namespace meki {

// How the inputs of a convolution are kept for later tokens: where the KV cache is exact, so are they.
constexpr size_t convolution_bytes(KvType kv_type) { return kv_type == KvType::float32 ? 4 : 2; }

// A causal convolution of each channel over the tokens of a sequence, as Engram has it. Passive data.
struct ConvolutionArgs {
  size_t tokens = 0;  // of this step
  size_t past = 0;    // tokens before it
  size_t channels = 0;
  size_t kernel = 0;                   // taps
  size_t dilation = 0;                 // tokens from tap to tap
  const float* x = nullptr;            // [tokens, channels]
  const float* norm_weight = nullptr;  // [channels]
  float epsilon = 1e-6F;
  const float* weight = nullptr;  // [kernel, channels]; the last tap is the token's own
  KvType kv_type = KvType::float32;
  std::byte* cache = nullptr;  // [past + tokens or more, channels] of convolution_bytes() each: norms of x
  float* out = nullptr;        // [tokens, channels]
};

// out = x + SiLU(sum over taps j of weight_j * n[t - (kernel - 1 - j) * dilation]), n = RMSNorm(x), 0 before the first
// token (spec: Engram's short convolution, transformers' Qwen4ExpTextPLELayer). Every n comes from the cache, those of
// this step, too: how a sequence is cut into steps does not matter. Thread-safe.
void convolve(const ConvolutionArgs& args, const Parallel& parallel);

}  // namespace meki
