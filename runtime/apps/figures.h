#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/apps/options.h"
#include "runtime/engine/session.h"
#include "runtime/measure/plan.h"
#include "runtime/measure/process.h"

namespace meki::bench {

// What the options come to for a model of `context` tokens: one contender, one depth, which is synthetic. Throws
// std::invalid_argument for what does not fit.
Plan make_plan(const Options& options, size_t context);

struct Figures {
  std::vector<double> prefill_tokens_per_s;  // of each round
  std::vector<double> decode_tokens_per_s;   // of each round
  std::vector<double> stall_us;              // wait for rows of each decode step of all rounds; empty without a memory
  std::optional<double> row_hit_rate;        // of what decode needed, what the row cache had; none without a memory
  std::optional<double> storage_bytes_per_token;  // fetched from storage by the process, a decode step
  std::optional<ResidentMemory> memory;           // after decode has run once
};

// Measures the plan (measure/measure.h): all rounds of prefill, then all of decode. Throws what measure() throws.
Figures take_figures(const std::shared_ptr<const Engine>& engine, const Plan& plan, const Session::Poll& poll);

// The logits of all `ids`, float32 [ids, vocab_size].
std::vector<float> compute_logits(const std::shared_ptr<const Engine>& engine, const std::vector<int64_t>& ids,
                                  const Session::Poll& poll);

}  // namespace meki::bench
