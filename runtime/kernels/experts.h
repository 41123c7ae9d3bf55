#pragma once

#include <cstddef>

#include "runtime/base/parallel.h"
#include "runtime/kernels/linear.h"
#include "runtime/kernels/simd/simd.h"

namespace meki {

// A matrix [outputs, inputs] of each expert, one below the other: packed (outputs is a multiple of 16), or
// float32. Passive data.
struct ExpertMatrices {
  const std::byte* data = nullptr;
  size_t outputs = 0;
  size_t inputs = 0;
  WeightType type = WeightType::float32;

  PackedWeight packed(size_t expert) const {
    PackedWeight weight{data, outputs, inputs, type};
    weight.panels += expert * weight.bytes();
    return weight;
  }
  const float* floats(size_t expert) const { return reinterpret_cast<const float*>(data) + expert * outputs * inputs; }
};

// What one layer's mixture of experts computes on. Passive data.
struct ExpertsArgs {
  size_t tokens = 0;
  const float* x = nullptr;            // [tokens, hidden]
  const float* norm_weight = nullptr;  // [hidden], of the norm before
  float epsilon = 1e-6F;
  const float* router = nullptr;  // [experts, hidden]
  size_t experts = 0;
  size_t experts_per_token = 0;     // at most `experts`
  bool norm_topk_prob = false;      // the shares of a token's experts sum to 1
  ExpertMatrices gate_up{};         // outputs: gate's, then up's
  ExpertMatrices down{};            // outputs: hidden
  const float* residual = nullptr;  // [tokens, hidden]; null: zeros
  float* out = nullptr;             // [tokens, hidden]
};

// out = residual + sum over a token's experts of share * down(silu(gate h) * up h), h = RMSNorm(x)
//
// The shares are softmax(router h), all in float32; a token's experts are those with the largest, of equal ones those
// of lower index. Only their weights are read, each expert's once for all its tokens. Inputs of packed matrices are
// rounded to 8 bits as in linear(). A NaN makes its own token's output NaN. Thread-safe. Throws std::bad_alloc.
void mix_experts(const Simd& simd, const ExpertsArgs& args, const Parallel& parallel);

}  // namespace meki
