#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace meki {

// A weight matrix [outputs, inputs] in packed panels of 16 rows (docs/package-format.md, "Linear"). Passive data.
struct PackedWeight {
  const std::byte* panels = nullptr;
  size_t outputs = 0;
  size_t inputs = 0;  // a multiple of 32
  int bits = 4;       // or 8

  size_t panel_count() const { return (outputs + 15) / 16; }
  size_t panel_bytes() const { return inputs / 32 * (64 * static_cast<size_t>(bits) + 32); }
  size_t bytes() const { return panel_count() * panel_bytes(); }
};

// out[t, n] = x[t] . weight[n]; x float32 [tokens, inputs], out float32 [tokens, outputs]. x is rounded to 8 bits in
// blocks of 32. Reads the weight once for up to a few hundred tokens. Thread-safe. Throws std::bad_alloc.
void linear(const Simd& simd, const PackedWeight& weight, const float* x, size_t tokens, float* out,
            const Parallel& parallel);

// out[t] = weight[ids[t]], float32 [tokens, inputs]. Every id is below weight.outputs.
void embedding(const PackedWeight& weight, const int64_t* ids, size_t tokens, float* out);

}  // namespace meki
