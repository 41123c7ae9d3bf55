#pragma once

// Whose tokens an operator computes that keeps something from step to step.

#include <cstddef>
#include <cstdint>
#include <span>

#include "runtime/graph/batch.h"
#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {

// Some tokens of a step that are one sequence's. Passive data.
struct SequencePart {
  size_t first = 0;  // of these tokens, in the step
  size_t tokens = 0;
  size_t past = 0;             // tokens of the sequence before them
  std::span<std::byte> state;  // of the sequence
};

inline constexpr size_t kNoOutput = SIZE_MAX;

// Calls work(part) for every sequence of a step of `tokens` tokens; the operator's inputs are the state, which is its
// output `output` as well (none: it is only read), and total_sequence_length, one integer.
template <class Work>
void each_sequence(const Call& call, size_t tokens, size_t state, size_t output, size_t total, const Work& work) {
  const Shape shape = call.input_shape(state);
  // Written only where it is an output, too.
  auto* const memory = const_cast<std::byte*>(call.input<std::byte>(state));
  require(output == kNoOutput || call.output<std::byte>(output, shape) == memory,
          "past and present are not the same memory");
  require(call.input_shape(total).elements() == 1, "total_sequence_length is not one integer");
  const BatchedStep* const batch = BatchedStep::current;
  if (const auto states = batch != nullptr ? batch->of(memory) : BatchedStep().memory; !states.empty()) {
    require(states.size() == tokens, "the step has another number of tokens than of sequences");
    for (size_t t = 0; t < tokens; ++t) work(SequencePart{t, 1, batch->pasts[t], states[t]});
    return;
  }
  const int32_t length = *call.input<int32_t>(total);
  require(length >= 0 && static_cast<size_t>(length) >= tokens, "the sequence is shorter than this step");
  work(SequencePart{0, tokens, static_cast<size_t>(length) - tokens, {memory, shape.elements()}});
}

}  // namespace meki::ops
