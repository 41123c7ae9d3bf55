#include "runtime/kernels/injection.h"

#include <algorithm>
#include <cmath>

#include "runtime/kernels/norm.h"
#include "runtime/kernels/scratch.h"

namespace meki {

void inject(const Simd& simd, const InjectionStep& step, const Parallel& parallel) {
  constexpr size_t kTokens = 8;  // of one piece of what is not a matrix product
  const size_t hidden = step.out_proj.outputs;
  const size_t memory_dim = step.out_proj.inputs;
  const size_t pieces = (step.tokens + kTokens - 1) / kTokens;
  thread_local Scratch scratch;
  scratch.begin(Scratch::bytes<float>(step.tokens * memory_dim));
  float* const fused = scratch.take<float>(step.tokens * memory_dim);
  parallel(pieces, [&step, fused, memory_dim](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(step.tokens, (piece + 1) * kTokens); ++t) {
      const float* const gate = step.gate + t * step.gate_stride;
      const float* const row = step.rows + t * memory_dim;
      for (size_t i = 0; i < memory_dim; ++i) fused[t * memory_dim + i] = row[i] + 1 / (1 + std::exp(-gate[i]));
    }
  });
  const LinearInput plain{.x = fused, .stride = memory_dim};
  linear(simd, step.out_proj, plain, nullptr, step.tokens, step.out, parallel);
  parallel(pieces, [&step, hidden](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(step.tokens, (piece + 1) * kTokens); ++t) {
      float* const y = step.out + t * hidden;
      const float* const x = step.x + t * hidden;
      const float inverse = inverse_rms(y, hidden, step.epsilon);
      for (size_t i = 0; i < hidden; ++i) y[i] = x[i] + y[i] * inverse * step.out_gain[i];
    }
  });
}

}  // namespace meki
