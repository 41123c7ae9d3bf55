#pragma once

#include <cstddef>

#include "runtime/base/parallel.h"
#include "runtime/kernels/linear.h"
#include "runtime/kernels/simd/simd.h"

namespace meki {

// How a memory row and the gate become one: row + f(gate) or row * f(gate).
struct Fusion {
  enum class Activation { sigmoid, silu, gelu_tanh };
  Activation activation = Activation::sigmoid;
  bool multiply = false;
};

// What one layer's memory injection computes on. Passive data.
struct InjectionArgs {
  size_t tokens = 0;
  const float* x = nullptr;            // [tokens, hidden]: the residual stream
  const float* h = nullptr;            // [tokens, hidden]: what the gate sees
  const float* norm_weight = nullptr;  // [hidden], of an RMSNorm on h; null: none
  PackedWeight gate_proj{};            // [memory_dim, hidden]
  const float* rows = nullptr;         // [tokens, memory_dim]: folded memory rows of the layer
  float row_scale = 1;
  const float* context = nullptr;  // [tokens, memory_dim], lines `context_stride` floats apart; null: none
  size_t context_stride = 0;
  const float* context_norm_weight = nullptr;  // [memory_dim], with a context
  Fusion fusion{};
  PackedWeight out_proj{};                  // [hidden, memory_dim]
  const float* post_norm_weight = nullptr;  // [hidden], of the norm behind out_proj
  float epsilon = 1e-6F;                    // of all norms
  float scale = 1;                          // of the result
  float* out = nullptr;                     // [tokens, hidden]
};

// By default MeKi's folded form (arXiv 2602.03359):
//
//   out = x + RMSNorm(out_proj (rows + sigmoid(gate_proj RMSNorm(h))))
//
// With the rest that Gemma 4 has, out is times `scale`, and in place of rows stands row_scale * rows +
// RMSNorm(context). The inputs of both products are rounded to 8 bits as in linear(). Thread-safe. Throws
// std::bad_alloc.
void inject(const Simd& simd, const InjectionArgs& args, const Parallel& parallel);

}  // namespace meki
