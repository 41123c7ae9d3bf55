#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/apps/options.h"
#include "runtime/engine/session.h"
#include "runtime/measure/process.h"

namespace meki::bench {

// What to measure. Counts are of tokens.
struct Plan {
  size_t depth = 0;    // in the cache when decode begins; 0 is as 1: a generation needs a token to start from
  size_t prefill = 0;  // 0: none
  size_t tokens = 0;   // decode steps of a round
  size_t repetitions = 0;
  bool cold = false;

  // Sequence that a decode round makes: the depth, a token that starts it, and one a step.
  size_t decode_context() const { return filled() + 1 + tokens + 1; }
  // Tokens of the depth whose keys and values are not computed; one more is.
  size_t filled() const { return depth > 0 ? depth - 1 : 0; }
  size_t context() const { return std::max(prefill + 1, decode_context()); }
};

// What the options come to for a model of `context` tokens. Throws std::invalid_argument for what does not fit.
Plan make_plan(const Options& options, size_t context);

struct Measurement {
  std::vector<double> prefill_tokens_per_s;  // of each round
  std::vector<double> decode_tokens_per_s;   // of each round
  std::vector<double> stall_us;              // wait for rows of each decode step of all rounds; empty without a memory
  std::optional<double> storage_bytes_per_token;  // fetched from storage by the process, a decode step
  std::optional<ResidentMemory> memory;           // at the end
};

// Runs the plan: a round of prefill that is not counted, and `repetitions` that are; then the same of decode, at the
// depth, which is filled once. Speeds are those of the time inside the engine. `poll` is called before every step and
// may throw to interrupt. Throws what a session throws.
Measurement measure(const std::shared_ptr<const Engine>& engine, const Plan& plan, const Session::Poll& poll);

// The logits of all `ids`, float32 [ids, vocab_size].
std::vector<float> compute_logits(const std::shared_ptr<const Engine>& engine, const std::vector<int64_t>& ids,
                                  const Session::Poll& poll);

}  // namespace meki::bench
