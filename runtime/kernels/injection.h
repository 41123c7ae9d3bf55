#pragma once

#include <cstddef>

#include "kernels/linear.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace meki {

// What one layer's memory injection computes on. Passive data.
struct InjectionStep {
  size_t tokens = 0;
  const float* attended = nullptr;  // [tokens, hidden]: the residual stream after attention
  const float* x = nullptr;         // [tokens, hidden]: the same after the FFN
  const float* rows = nullptr;      // [tokens, memory_dim]: folded memory rows of the layer
  PackedWeight gate;                // [memory_dim, hidden]
  PackedWeight out_proj;            // [hidden, memory_dim]
  const float* ffn_gain = nullptr;  // [hidden], of the norm before the FFN
  const float* out_gain = nullptr;  // [hidden], of the norm behind out_proj
  float epsilon = 1e-6F;            // of both norms
  float* out = nullptr;             // [tokens, hidden]
};

// MeKi's folded form (arXiv 2602.03359): with h = RMSNorm(attended),
//
//   out = x + RMSNorm(out_proj (rows + sigmoid(gate h)))
//
// Inputs of both matrices are rounded to 8 bits as in linear(). Thread-safe. Throws std::bad_alloc.
void inject(const Simd& simd, const InjectionStep& step, const Parallel& parallel);

}  // namespace meki
