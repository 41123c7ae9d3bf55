#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "runtime/kernels/kv_cache.h"
#include "runtime/kernels/weight_type.h"

namespace meki {

// The queries that one head's keys and values serve: those of the query heads of its group, of one or more tokens. All
// are scaled already. Integer caches take them in 8 bits, query = scale * code with codes of -127 .. 127: as many as a
// key has. Passive data.
struct Queries {
  size_t count = 0;
  size_t head_dim = 0;
  const float* values = nullptr;  // [count, head_dim]
  const int8_t* codes = nullptr;  // [count, head_dim]
  const float* scales = nullptr;  // [count]
  const int32_t* sums = nullptr;  // [count, head_dim / 16]: of the codes of 16 elements
};

// Inputs of a quantised linear layer: x = scale * code, in blocks of 32. What stands in `excess` is what products with
// codes of weights that have an offset of 8 have too much, negated: -8 times the sum of a block's 32 codes, and of the
// first 16 of them. Passive data.
struct Activations {
  size_t tokens = 0;
  size_t inputs = 0;                // a multiple of 32
  const int8_t* codes = nullptr;    // [tokens, inputs], -127 .. 127
  const float* scales = nullptr;    // [tokens, inputs / 32]
  const int32_t* excess = nullptr;  // [tokens, inputs / 32, 2]
};

// What an instruction set must provide; everything else is shared. Pure functions without state. Integer parts are
// exact, so that two paths differ by float rounding alone: the order of additions, and at most 1 ulp in exp. A NaN in a
// key, value or query comes out as NaN, also from positions of its block that are masked.
struct Simd {
  std::string_view name;

  // scores[q][p] = query q . key p of one cache block, float32 [queries.count][64]. `block` is the block's keys
  // (scales, then codes). Indexed by KvType.
  using Scores = void (*)(const Queries& queries, const std::byte* block, float* scores);
  Scores scores[4];

  // outputs[q] += sum over p of weights[q][p] * value p of one cache block; weights float32 [count][64], all >= 0,
  // outputs float32 [count][head_dim]. Integer caches round weight * value scale to 8 bits, 0 .. 255, relative to the
  // block's largest. Indexed by KvType.
  using Values = void (*)(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs);
  Values values[4];

  // out[i] = (y[i] cos[i] - y[half + i] sin[i]) * scale and out[half + i] = (y[half + i] cos[i] + y[i] sin[i]) * scale,
  // with half = size / 2 and y[i] = x[i] * factor * weight[i], or x[i] if weight is null: a head's RMSNorm, then RoPE.
  // size: a multiple of 16. Every path gives the same bits. out may be x.
  void (*rotate)(const float* x, size_t size, float factor, const float* weight, const float* cos, const float* sin,
                 float scale, float* out);

  // Multiplies by the orthonormal Hadamard matrix, in runs of the largest power of two that divides `size`, a multiple
  // of 16. Every path gives the same bits.
  void (*hadamard)(float* values, size_t size);

  // x float32 [size], a multiple of 16 -> codes of -127 .. 127; returns what they are worth, the largest magnitude
  // divided by 127: not finite if one is not. sums (null: not wanted): of the codes of 16 elements, [size / 16].
  float (*quantize_head)(const float* x, size_t size, int8_t* codes, int32_t* sums);

  // One step of the online softmax for one query: replaces 64 scores (-inf: masked) by exp(score - maximum), keeps the
  // running maximum and sum, and rescales output [head_dim] when the maximum grows. A maximum of -inf means that
  // nothing was seen yet; weights of a block that is masked entirely are 0.
  void (*softmax)(float* scores, float* maximum, float* sum, float* output, size_t head_dim);

  // out[i] = silu(gate[i]) * up[i], silu(x) = x / (1 + e^-x), for a multiple of 16 elements.
  void (*swiglu)(const float* gate, const float* up, size_t count, float* out);

  // The same with GELU in its tanh form: x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
  void (*geglu)(const float* gate, const float* up, size_t count, float* out);

  // x float32 [inputs] -> one row of Activations.
  void (*quantize)(const float* x, size_t inputs, int8_t* codes, float* scales, int32_t* excess);

  // out[t * stride + r] = x_t . row r for the 16 rows of one packed panel (docs/package-format.md) and all tokens.
  // Indexed by WeightType; none for float32.
  using Panel = void (*)(const std::byte* panel, const Activations& x, float* out, size_t stride);
  Panel panels[kWeightTypes];
};

// The paths that this CPU can run, best first; the last is "portable". Static data.
std::span<const Simd* const> simd_paths();
// The best one.
inline const Simd& simd() { return *simd_paths().front(); }

}  // namespace meki
