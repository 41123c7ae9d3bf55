#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/engine/session.h"

namespace meki::bench {

// What one prefill, or some decode steps in a row, took. Passive data.
struct Block {
  size_t tokens = 0;
  uint64_t ns = 0;                          // inside the engine
  uint64_t sample_ns = 0;                   // of `ns`: choosing tokens
  std::vector<uint64_t> stall_ns{};         // the wait for rows: of each decode step, or of a prefill the mean of its
                                            // tokens; empty in a dense model
  RowCounters rows{};                       // what was requested meanwhile; nothing in a dense model
  std::optional<uint64_t> storage_bytes{};  // what the whole process fetched from storage meanwhile; none: not told
};

// What a measured sequence calls. Both may throw to interrupt.
struct StepHooks {
  std::function<void()> before_step = [] {};  // before every step, and so before the request for the next one's rows
  Session::Poll poll{};                       // between two prefill steps
};

// Tokens that a session needs for `steps` decode steps at `depth`: the sequence, and the token that the last step
// makes. A generation needs a token to start from, so that depth 0 is one token.
size_t decode_context(size_t depth, size_t steps);

// The prefill of `tokens` tokens, the same ones every time.
class PrefillSequence {
 public:
  PrefillSequence(const std::shared_ptr<const Engine>& engine, size_t tokens, StepHooks hooks);

  // Computes them from an empty cache. Throws std::runtime_error if the engine counted other tokens, and what a session
  // throws.
  Block run();

  const Session& session() const { return session_; }

 private:
  const StepHooks hooks_;
  const bool has_rows_;
  const std::vector<int64_t> ids_;
  Session session_;
};

// Greedy decode steps from a cache of max(depth, 1) tokens on.
//
// The tokens are the same after every rewind(), so that their rows are in the page cache from the second time on. When
// the model ends its text, the sequence goes back to its depth and starts from another token.
class DecodeSequence {
 public:
  // Has room for `steps` decode steps from one rewind() to the next. Fills the cache: by a prefill, or `synthetic`,
  // with what was not computed. Throws what a session throws.
  DecodeSequence(const std::shared_ptr<const Engine>& engine, size_t depth, size_t steps, bool synthetic,
                 StepHooks hooks);

  // Back to the depth. Throws std::runtime_error if the model ends its text whatever it starts from, as decode() does.
  void rewind();
  // `tokens` steps that are measured, after `lead_in` that are not: the rows of a block's first step were requested
  // before it, perhaps long before. Throws std::runtime_error if the engine counted other tokens.
  Block decode(size_t tokens, size_t lead_in);

  // For every step of one token so far: whether a block that decode() returned counts it.
  const std::vector<bool>& history() const { return history_; }
  const Session& session() const { return session_; }

 private:
  void step(bool counted);
  void begin();

  const StepHooks hooks_;
  const bool synthetic_;
  const size_t base_;  // tokens below the last one of the depth, from which a generation starts
  const std::vector<int64_t> starts_;
  Session session_;
  size_t next_start_ = 0;
  std::vector<bool> history_;
};

}  // namespace meki::bench
