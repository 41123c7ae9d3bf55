#include "runtime/kernels/injection.h"

#include <cmath>
#include <span>

#include "runtime/kernels/each_token.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/scratch.h"

namespace meki {
namespace {

// All three are a sigmoid, times the gate or not; GELU in its tanh form is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715
// x^3)).
float activate(Fusion::Activation activation, float gate) {
  constexpr float kSlope = 1.5957691216F;
  const bool gelu = activation == Fusion::Activation::gelu_tanh;
  const float sigmoid = 1 / (1 + std::exp(gelu ? -kSlope * gate * (1 + 0.044715F * gate * gate) : -gate));
  return activation == Fusion::Activation::sigmoid ? sigmoid : gate * sigmoid;
}

}  // namespace

void inject(const Simd& simd, const InjectionArgs& args, const Parallel& parallel) {
  const size_t hidden = args.out_proj.outputs;
  const size_t memory_dim = args.out_proj.inputs;
  thread_local Scratch scratch;
  scratch.begin(Scratch::bytes<float>(args.tokens * memory_dim));
  float* const fused = scratch.take<float>(args.tokens * memory_dim);
  const auto kind = args.norm_weight != nullptr ? LinearInput::Kind::norm : LinearInput::Kind::plain;
  const LinearInput seen{kind, args.h, hidden, args.norm_weight, args.epsilon};
  linear(simd, args.gate_proj, seen, {}, args.tokens, fused, parallel);
  each_token(args.tokens, parallel, [&args, fused, memory_dim](size_t t) {
    float* const gate = fused + t * memory_dim;
    const float* const rows = args.rows + t * memory_dim;
    const float* const context = args.context == nullptr ? nullptr : args.context + t * args.context_stride;
    const float inverse = context == nullptr ? 0 : inverse_rms(context, memory_dim, args.epsilon);
    for (size_t i = 0; i < memory_dim; ++i) {
      float row = args.row_scale * rows[i];
      if (context != nullptr) row += context[i] * inverse * args.context_norm_weight[i];
      const float open = activate(args.fusion.activation, gate[i]);
      gate[i] = args.fusion.multiply ? row * open : row + open;
    }
  });
  const LinearInput plain{.x = fused, .stride = memory_dim};
  const LinearEnd added{args.x, args.post_norm_weight, args.epsilon};
  linear(simd, args.out_proj, plain, added, args.tokens, args.out, parallel);
  if (args.scale == 1) return;
  each_token(args.tokens, parallel, [&args, hidden](size_t t) {
    for (float& y : std::span(args.out + t * hidden, hidden)) y *= args.scale;
  });
}

}  // namespace meki
