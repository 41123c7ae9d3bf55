#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "runtime/engine/engine.h"

namespace meki {

// Speculative decoding: a drafter says which tokens may come next, the model computes all of them in one step, and
// those that it would have made itself stand. At each position the session's own sampler samples, with the same random
// numbers and the same penalty, from the model's own logits; if that is the drafted token, it goes on, otherwise the
// sampled token stands and the rest of the draft is dropped. What is drafted here is a point distribution, for which
// this is the rejection sampling of Leviathan et al. (arXiv 2211.17192): x is accepted with p(x), and otherwise
// replaced by a sample of the rest of p, renormalised. So a text is the same with a drafter as without one, to the bit
// of its logits.

// Called where something may take long; may throw to interrupt.
using Poll = std::function<void()>;

// Guesses how a sequence goes on. For one session, and one thread at a time.
class Drafter {
 public:
  virtual ~Drafter() = default;

  // Whether drafting takes next to no time and never fails: then it is done before the caller has the last token, so
  // that the rows of a draft are read meanwhile.
  virtual bool immediate() const = 0;
  // Writes the tokens that may follow `sequence`, which is not empty, to the front of `draft`, each below the target's
  // vocab_size; returns how many. Throws what its model throws, or `poll`.
  virtual size_t draft(std::span<const int32_t> sequence, std::span<int32_t> draft, const Poll& poll) = 0;
};

// Makes the drafter of one session of `target`, with room for `context` tokens. Throws std::invalid_argument if that
// cannot be.
using MakeDrafter = std::function<std::unique_ptr<Drafter>(const Engine& target, size_t context)>;

// Drafts what followed the last tokens where they occurred before: for texts that repeat a part of their prompt.
MakeDrafter prompt_lookup();

// Drafts the most probable tokens of a smaller model with the same vocabulary, in a session of its own with as large a
// context as `model` has, up to the target's; where that is full, nothing is drafted. That the tokens mean the same in
// both is the caller's to check, that there are as many is checked here.
MakeDrafter draft_model(std::shared_ptr<const Engine> model);

// How many tokens to draft: 3, 7 or more, as linear layers take a step's tokens 4 or 8 at a time. 3 at first; after a
// draft that was right to its end, twice as many and one; after another, as many as hold what was right. After a draft
// without one right token there is none for some steps, twice as many each time, up to 32: where drafts are never
// right, few are paid for.
class DraftLength {
 public:
  explicit DraftLength(size_t most) : most_(most) {}

  // Before a step: tokens to draft for it, at most `most`; 0: none.
  size_t next();
  // After a step with a draft.
  void update(size_t drafted, size_t accepted);

 private:
  size_t most_;
  size_t length_ = 3;
  size_t failures_ = 0;  // drafts in a row without a right token
  size_t pause_ = 0;     // steps left without a draft
};

}  // namespace meki
