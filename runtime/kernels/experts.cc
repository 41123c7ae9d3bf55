#include "runtime/kernels/experts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "runtime/kernels/each_token.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/scratch.h"

namespace meki {
namespace {

// out[t, n] = x[t] . weight[n], all float32; rows of x are `stride` apart.
void multiply(const float* weight, size_t outputs, size_t inputs, const float* x, size_t stride, size_t tokens,
              float* out, const Parallel& parallel) {
  constexpr size_t kRows = 16;  // of one piece
  const Parallel threads = outputs * inputs * tokens < (1 << 15) ? Parallel{} : parallel;
  threads((outputs + kRows - 1) / kRows, [=](size_t piece) {
    for (size_t n = piece * kRows; n < std::min(outputs, (piece + 1) * kRows); ++n) {
      for (size_t t = 0; t < tokens; ++t) out[t * outputs + n] = dot(weight + n * inputs, x + t * stride, inputs);
    }
  });
}

// out[t] = down(silu(gate x[t]) * up x[t]) of one expert. both: room for [tokens, gate and up].
void run_expert(const Simd& simd, const ExpertsArgs& args, size_t expert, const float* x, size_t tokens, float* both,
                float* out, const Parallel& parallel) {
  const ExpertMatrices& gate_up = args.gate_up;
  const ExpertMatrices& down = args.down;
  if (gate_up.type != WeightType::float32) {
    linear(simd, gate_up.packed(expert), {.x = x, .stride = gate_up.inputs}, {}, tokens, both, parallel);
    const LinearInput gated{.kind = LinearInput::Kind::swiglu, .x = both, .stride = gate_up.outputs};
    linear(simd, down.packed(expert), gated, {}, tokens, out, parallel);
    return;
  }
  multiply(gate_up.floats(expert), gate_up.outputs, gate_up.inputs, x, gate_up.inputs, tokens, both, parallel);
  each_token(tokens, parallel, [&, width = down.inputs](size_t t) {
    float* const gate = both + t * 2 * width;
    for (size_t i = 0; i < width; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * gate[width + i];
  });
  multiply(down.floats(expert), down.outputs, down.inputs, both, gate_up.outputs, tokens, out, parallel);
}

// logits -> the first `count` of `order`, the experts with the largest shares, and these.
void route(float* logits, size_t experts, size_t count, bool normalised, uint32_t* order, float* shares) {
  const float largest = *std::max_element(logits, logits + experts);
  float sum = 0;
  for (size_t e = 0; e < experts; ++e) {
    logits[e] = std::exp(logits[e] - largest);
    sum += logits[e];
  }
  for (size_t e = 0; e < experts; ++e) logits[e] /= sum;
  std::iota(order, order + experts, 0);
  // With a NaN all shares are NaN and every comparison false: an order all the same.
  std::partial_sort(order, order + count, order + experts, [logits](uint32_t a, uint32_t b) {
    return logits[a] > logits[b] || (!(logits[a] < logits[b]) && a < b);
  });
  sum = 0;
  for (size_t i = 0; i < count; ++i) sum += logits[order[i]];
  for (size_t i = 0; i < count; ++i) shares[i] = normalised ? logits[order[i]] / sum : logits[order[i]];
}

}  // namespace

void mix_experts(const Simd& simd, const ExpertsArgs& args, const Parallel& parallel) {
  const size_t tokens = args.tokens;
  const size_t experts = args.experts;
  const size_t count = args.experts_per_token;
  const size_t hidden = args.gate_up.inputs;
  thread_local Scratch scratch;
  scratch.begin(3 * Scratch::bytes<float>(tokens * hidden) + Scratch::bytes<float>(tokens * args.gate_up.outputs) +
                Scratch::bytes<float>(tokens * experts) + Scratch::bytes<uint32_t>(tokens * experts) +
                Scratch::bytes<float>(tokens * count) + Scratch::bytes<size_t>(tokens * count) +
                Scratch::bytes<size_t>(experts + 1));
  auto* const h = scratch.take<float>(tokens * hidden);
  auto* const rows = scratch.take<float>(tokens * hidden);   // of an expert's tokens: what goes in,
  auto* const given = scratch.take<float>(tokens * hidden);  // and what comes out
  auto* const both = scratch.take<float>(tokens * args.gate_up.outputs);
  auto* const logits = scratch.take<float>(tokens * experts);
  auto* const order = scratch.take<uint32_t>(tokens * experts);
  auto* const shares = scratch.take<float>(tokens * count);
  auto* const places = scratch.take<size_t>(tokens * count);  // in `shares`, by expert, then by token
  auto* const ends = scratch.take<size_t>(experts + 1);       // in `places`, of the experts before

  each_token(tokens, parallel, [&](size_t t) {
    const float* const x = args.x + t * hidden;
    const float inverse = inverse_rms(x, hidden, args.epsilon);
    for (size_t i = 0; i < hidden; ++i) h[t * hidden + i] = x[i] * inverse * args.norm_weight[i];
  });
  multiply(args.router, experts, hidden, h, hidden, tokens, logits, parallel);
  each_token(tokens, parallel, [&](size_t t) {
    route(logits + t * experts, experts, count, args.norm_topk_prob, order + t * experts, shares + t * count);
    if (args.residual != nullptr) {
      std::copy_n(args.residual + t * hidden, hidden, args.out + t * hidden);
    } else {
      std::fill_n(args.out + t * hidden, hidden, 0.0F);
    }
  });
  const auto chosen = [&](size_t place) { return order[place / count * experts + place % count]; };
  std::fill_n(ends, experts + 1, 0);
  for (size_t place = 0; place < tokens * count; ++place) ++ends[chosen(place) + 1];
  std::partial_sum(ends, ends + experts + 1, ends);
  for (size_t place = 0; place < tokens * count; ++place) places[ends[chosen(place)]++] = place;

  for (size_t e = 0; e < experts; ++e) {
    const size_t* const its = places + (e == 0 ? 0 : ends[e - 1]);
    const auto members = static_cast<size_t>(places + ends[e] - its);
    if (members == 0) continue;
    each_token(members, parallel,
               [=](size_t i) { std::copy_n(h + its[i] / count * hidden, hidden, rows + i * hidden); });
    run_expert(simd, args, e, rows, members, both, given, parallel);
    each_token(members, parallel, [=, &args](size_t i) {
      float* const y = args.out + its[i] / count * hidden;
      for (size_t j = 0; j < hidden; ++j) y[j] += shares[its[i]] * given[i * hidden + j];
    });
  }
}

}  // namespace meki
