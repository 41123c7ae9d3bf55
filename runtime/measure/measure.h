#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/measure/plan.h"
#include "runtime/measure/process.h"
#include "runtime/measure/sequence.h"

// The protocol of measuring, described for its readers in docs/benchmark.md: rounds of all tests, in which every
// contender takes its turn.
namespace meki::bench {

using Contenders = std::span<const std::shared_ptr<const Engine>>;

// One test: prefill of `tokens` tokens, or as many decode steps, from `depth` tokens on.
struct Case {
  std::string_view kind;  // "prefill" or "decode"
  size_t depth = 0;
  size_t tokens = 0;
  std::optional<size_t> kv_bytes{};  // of keys and values that a decode step of the first contender reads in the middle
                                     // of the test; none for prefill
};

// What each contender measured in one run of a test: a block, or one a turn. [contender][turn]
using Blocks = std::vector<std::vector<Block>>;

struct Measurement {
  std::vector<Case> cases;                           // prefill, if there is one, then the depths in the plan's order
  std::vector<std::vector<Blocks>> rounds;           // [repetition][case]
  std::map<size_t, std::vector<double>> bandwidths;  // bytes/s before the first round and after each, by the number of
                                                     // threads, for each that a contender has
  std::optional<ResidentMemory> memory;  // after every test has run once; `rom` is that of the first contender
};

// What measure() calls. All may throw to interrupt.
struct Hooks {
  Session::Poll poll = [] {};                                             // before every step and between prefill's
  std::function<void(const std::string&)> progress = [](const auto&) {};  // told what comes next, Plan::units() times
  std::function<double(size_t threads)> read_bandwidth{};                 // empty: not measured
};

// Runs every test once to warm up, then `plan.repetitions` rounds of all tests.
//
// Round r runs every test once, so that a drift of the machine hits all alike; every other round begins with the end
// of the contenders. Sessions, one a test and contender, are kept from round to round and rewound. Throws
// std::invalid_argument for a plan that does not fit the number of contenders, and what sequences throw.
Measurement measure(Contenders contenders, const Plan& plan, const Hooks& hooks);

// Who measures when in one run of a decode test: one after the other, or to compare A B B A, which neither a linear
// drift nor the order favours.
std::vector<size_t> turns(const Plan& plan, size_t contenders, bool reverse);

struct Profile {
  Block block;
  std::vector<bool> history;  // as DecodeSequence has it
};

// `plan.tokens` decode steps of `engine` alone, in one block, from a cache that is filled with `depth` tokens. When it
// returns, nothing uses the engine any more.
Profile profile_decode(const std::shared_ptr<const Engine>& engine, const Plan& plan, size_t depth,
                       const Session::Poll& poll);

}  // namespace meki::bench
