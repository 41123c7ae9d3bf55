#pragma once

#include <cstddef>

#include "runtime/base/parallel.h"
#include "runtime/kernels/linear.h"
#include "runtime/kernels/simd/simd.h"

namespace meki {

// What one layer's memory injection computes on. Passive data.
struct InjectionStep {
  size_t tokens = 0;
  const float* x = nullptr;         // [tokens, hidden]: the residual stream after the FFN
  const float* gate = nullptr;      // memory_dim logits of each token, W_gate h: h is the FFN's input
  size_t gate_stride = 0;           // floats from one token's logits to the next one's
  const float* rows = nullptr;      // [tokens, memory_dim]: folded memory rows of the layer
  PackedWeight out_proj;            // [hidden, memory_dim]
  const float* out_gain = nullptr;  // [hidden], of the norm behind out_proj
  float epsilon = 1e-6F;
  float* out = nullptr;  // [tokens, hidden]
};

// The rest of MeKi's folded form (arXiv 2602.03359):
//
//   out = x + RMSNorm(out_proj (rows + sigmoid(gate)))
//
// The input of out_proj is rounded to 8 bits as in linear(). Thread-safe. Throws std::bad_alloc.
void inject(const Simd& simd, const InjectionStep& step, const Parallel& parallel);

}  // namespace meki
