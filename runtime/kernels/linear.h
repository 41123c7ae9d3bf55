#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "runtime/base/parallel.h"
#include "runtime/kernels/simd/simd.h"
#include "runtime/kernels/weight_type.h"

namespace meki {

// A weight matrix [outputs, inputs] in packed panels of 16 rows (docs/package-format.md, "Packed matrices"). Passive
// data.
struct PackedWeight {
  const std::byte* panels = nullptr;
  size_t outputs = 0;
  size_t inputs = 0;  // a multiple of 32
  WeightType type = WeightType::int8;

  size_t panel_count() const { return (outputs + 15) / 16; }
  size_t panel_bytes() const { return inputs / 32 * block_bytes(type); }
  size_t bytes() const { return panel_count() * panel_bytes(); }
};

// What a matrix is multiplied with: one of four functions of x, whose rows are `stride` floats apart. Passive data.
struct LinearInput {
  enum class Kind {
    plain,   // x
    norm,    // x / sqrt(mean(x^2) + epsilon) * norm_weight: RMSNorm
    swiglu,  // silu(x[0 .. inputs)) * x[inputs .. 2 * inputs); a row may be longer
    geglu,   // the same with GELU in its tanh form
  };
  Kind kind = Kind::plain;
  const float* x = nullptr;  // [tokens, stride]
  size_t stride = 0;
  const float* norm_weight = nullptr;  // [inputs], of norm
  float epsilon = 0;
};

// What becomes of the product: first an RMSNorm over all outputs of a token, then the sum with the residual. By default
// neither. Passive data.
struct LinearEnd {
  const float* residual = nullptr;          // [tokens, outputs of all]
  const float* post_norm_weight = nullptr;  // [outputs of all]
  float epsilon = 0;                        // of that norm
};

// out[t, n] = residual[t, n] + norm(input[t] . weight[n]), weight being matrices of as many inputs one below the other;
// out is float32 [tokens, outputs of all]. The input is rounded to 8 bits in blocks of 32.
// Reads the weights once for up to a few hundred tokens. Thread-safe. Throws std::bad_alloc.
void linear(const Simd& simd, std::span<const PackedWeight> weights, const LinearInput& input, const LinearEnd& end,
            size_t tokens, float* out, const Parallel& parallel);
// Of one matrix.
inline void linear(const Simd& simd, const PackedWeight& weight, const LinearInput& input, const LinearEnd& end,
                   size_t tokens, float* out, const Parallel& parallel) {
  linear(simd, std::span(&weight, 1), input, end, tokens, out, parallel);
}

// out[t] = weight[ids[t]], float32 [tokens, inputs]. Every id is below weight.outputs.
void embedding(const PackedWeight& weight, const int64_t* ids, size_t tokens, float* out);

}  // namespace meki
