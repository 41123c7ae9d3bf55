#include "runtime/kernels/injection.h"

#include <algorithm>
#include <cmath>

#include "runtime/kernels/norm.h"
#include "runtime/kernels/scratch.h"

namespace meki {

void inject(const Simd& simd, const InjectionArgs& args, const Parallel& parallel) {
  constexpr size_t kTokens = 8;  // of one piece of what is not a matrix product
  const size_t hidden = args.out_proj.outputs;
  const size_t memory_dim = args.out_proj.inputs;
  const size_t pieces = (args.tokens + kTokens - 1) / kTokens;
  thread_local Scratch scratch;
  scratch.begin(Scratch::bytes<float>(args.tokens * memory_dim));
  float* const fused = scratch.take<float>(args.tokens * memory_dim);
  const LinearInput normed{LinearInput::Kind::norm, args.h, hidden, args.norm_weight, args.epsilon};
  linear(simd, args.gate_proj, normed, nullptr, args.tokens, fused, parallel);
  parallel(pieces, [&args, fused, memory_dim](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(args.tokens, (piece + 1) * kTokens); ++t) {
      float* const gate = fused + t * memory_dim;
      const float* const row = args.rows + t * memory_dim;
      for (size_t i = 0; i < memory_dim; ++i) gate[i] = row[i] + 1 / (1 + std::exp(-gate[i]));
    }
  });
  const LinearInput plain{.x = fused, .stride = memory_dim};
  linear(simd, args.out_proj, plain, nullptr, args.tokens, args.out, parallel);
  parallel(pieces, [&args, hidden](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(args.tokens, (piece + 1) * kTokens); ++t) {
      float* const y = args.out + t * hidden;
      const float* const x = args.x + t * hidden;
      const float inverse = inverse_rms(y, hidden, args.epsilon);
      for (size_t i = 0; i < hidden; ++i) y[i] = x[i] + y[i] * inverse * args.post_norm_weight[i];
    }
  });
}

}  // namespace meki
