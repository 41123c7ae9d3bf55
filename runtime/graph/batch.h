#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace meki {

// A step of several sequences, one token of each, which the inputs of a graph cannot tell: it is set around the runs of
// the stages, on the thread that calls them, and read by operators that keep something from step to step. In such a
// step total_sequence_length is the number of tokens, and each state ("past.N") is bound to an empty tensor whose
// address stands for it. A graph that hands an operator any other address gets nothing of a sequence.
struct BatchedStep {
  std::span<const size_t> pasts;                 // of each token: those of its sequence before it
  std::span<const std::byte> states;             // the address of state i is that of states[i]
  std::span<const std::span<std::byte>> memory;  // [states, tokens]: what each token's sequence has of it

  // What each token's sequence has of a state; nothing for an address that stands for none.
  std::span<const std::span<std::byte>> of(const std::byte* state) const {
    const auto index = reinterpret_cast<uintptr_t>(state) - reinterpret_cast<uintptr_t>(states.data());
    if (index >= states.size()) return {};
    return memory.subspan(index * pasts.size(), pasts.size());
  }

  // Null: a step of one sequence.
  static inline thread_local const BatchedStep* current = nullptr;

  // Makes a step the current one of this thread for its life.
  class Scope {
   public:
    explicit Scope(const BatchedStep& step) { current = &step; }
    ~Scope() { current = nullptr; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };
};

}  // namespace meki
