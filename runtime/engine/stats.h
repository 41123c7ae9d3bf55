#pragma once

#include <cstdint>
#include <vector>

#include "runtime/rows/prefetcher.h"

namespace meki {

// What one session has done since it was made or its statistics were last reset. Passive data.
struct Stats {
  uint64_t prefill_tokens = 0;
  uint64_t prefill_ns = 0;
  uint64_t prefill_stall_ns = 0;   // of prefill_ns: waiting for rows
  uint64_t decode_tokens = 0;      // that decode steps made: one each, more with a drafter
  uint64_t decode_ns = 0;          // a step that several sessions took together counts whole for each
  uint64_t sample_ns = 0;          // of decode_ns: choosing tokens
  std::vector<uint64_t> stall_ns;  // of each decode step: waiting for its rows; empty in a dense model
  uint64_t drafted_tokens = 0;     // that decode steps computed beyond the pending token
  uint64_t accepted_tokens = 0;    // of these: became part of the sequence
  RowCounters rows;
};

}  // namespace meki
