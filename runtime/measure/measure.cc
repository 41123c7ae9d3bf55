#include "runtime/measure/measure.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <set>
#include <stdexcept>

namespace meki::bench {
namespace {

// A test and what runs it: a sequence a contender, of one kind.
struct Test {
  Case description;
  std::deque<PrefillSequence> prefills;
  std::deque<DecodeSequence> decodes;

  std::string title(const std::string& round) const {
    return round + ": " + std::string(description.kind) + " " + std::to_string(description.tokens) + " at " +
           std::to_string(description.depth);
  }
};

void check(const Plan& plan, size_t contenders) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument(what);
  };
  require(contenders > 0, "no contenders, expected at least 1");
  require(!plan.compare || contenders == 2, std::to_string(contenders) + " contenders, to compare there have to be 2");
  require(plan.tokens > 0, "tokens is 0, expected at least 1");
  require(!plan.compare || plan.tokens % Plan::kGroup == 0, "tokens is " + std::to_string(plan.tokens) +
                                                                ", to compare it has to be a multiple of " +
                                                                std::to_string(Plan::kGroup));
}

StepHooks step_hooks(Contenders contenders, const Plan& plan, const Session::Poll& poll) {
  std::vector<std::shared_ptr<const RowSource>> dropped;
  for (const auto& engine : contenders) {
    if (plan.cold && engine->rows() != nullptr) dropped.push_back(engine->rows());
  }
  const auto before_step = [poll, dropped] {
    poll();
    for (const auto& rows : dropped) rows->drop_cache();
  };
  return {before_step, poll};
}

// In a list, as sequences do not move.
std::deque<Test> make_tests(Contenders contenders, const Plan& plan, const Hooks& hooks) {
  const StepHooks steps = step_hooks(contenders, plan, hooks.poll);
  std::deque<Test> tests;
  if (plan.prefill > 0) {
    Test& test = tests.emplace_back();
    test.description = {.kind = "prefill", .tokens = plan.prefill};
    for (const auto& engine : contenders) test.prefills.emplace_back(engine, plan.prefill, steps);
  }
  for (const size_t depth : plan.depths) {
    hooks.progress("filling " + std::to_string(depth) + " tokens");
    Test& test = tests.emplace_back();
    for (const auto& engine : contenders) {
      test.decodes.emplace_back(engine, depth, plan.steps(), plan.synthetic_depth, steps);
    }
    const size_t kv_bytes = test.decodes.front().session().kv_bytes(plan.mean_depth(depth));
    test.description = {.kind = "decode", .depth = depth, .tokens = plan.tokens, .kv_bytes = kv_bytes};
  }
  return tests;
}

Blocks run(Test& test, const Plan& plan, bool reverse) {
  Blocks blocks(std::max(test.prefills.size(), test.decodes.size()));
  for (size_t index = 0; index < test.prefills.size(); ++index) {
    const size_t contender = reverse ? test.prefills.size() - 1 - index : index;
    blocks[contender] = {test.prefills[contender].run()};
  }
  for (DecodeSequence& sequence : test.decodes) sequence.rewind();
  if (!test.decodes.empty()) {
    for (const size_t contender : turns(plan, test.decodes.size(), reverse)) {
      blocks[contender].push_back(test.decodes[contender].decode(plan.turn(), plan.lead_in));
    }
  }
  return blocks;
}

std::optional<std::filesystem::path> rom_of(const Manifest& manifest) {
  return manifest.memory ? std::optional(manifest.directory / manifest.memory->file) : std::nullopt;
}

}  // namespace

Measurement measure(Contenders contenders, const Plan& plan, const Hooks& hooks) {
  check(plan, contenders.size());
  std::deque<Test> tests = make_tests(contenders, plan, hooks);
  const auto run_round = [&](const std::string& name, bool reverse) {
    std::vector<Blocks> results;
    for (Test& test : tests) {
      hooks.progress(test.title(name));
      results.push_back(run(test, plan, reverse));
    }
    return results;
  };
  std::set<size_t> thread_counts;
  for (const auto& engine : contenders) thread_counts.insert(engine->threads());
  Measurement result;
  const auto measure_bandwidth = [&] {
    if (!hooks.read_bandwidth) return;
    for (const size_t threads : thread_counts) result.bandwidths[threads].push_back(hooks.read_bandwidth(threads));
  };
  for (const Test& test : tests) result.cases.push_back(test.description);
  run_round("warm-up", false);
  result.memory = resident_memory(rom_of(contenders.front()->manifest()));  // before a bandwidth's buffer
  measure_bandwidth();
  for (size_t round = 0; round < plan.repetitions; ++round) {
    result.rounds.push_back(run_round("round " + std::to_string(round + 1), round % 2 == 1));
    measure_bandwidth();
  }
  return result;
}

std::vector<size_t> turns(const Plan& plan, size_t contenders, bool reverse) {
  std::vector<size_t> order(contenders);
  std::iota(order.begin(), order.end(), size_t{0});
  if (reverse) std::reverse(order.begin(), order.end());
  if (!plan.compare) return order;
  const size_t first = order[0];
  const size_t second = order[1];
  order.clear();
  for (size_t steps = 0; steps < plan.tokens; steps += Plan::kGroup) {
    order.insert(order.end(), {first, second, second, first});
  }
  return order;
}

Profile profile_decode(const std::shared_ptr<const Engine>& engine, const Plan& plan, size_t depth,
                       const Session::Poll& poll) {
  DecodeSequence sequence(engine, depth, plan.tokens + plan.lead_in, true, step_hooks({&engine, 1}, plan, poll));
  sequence.rewind();
  Block block = sequence.decode(plan.tokens, plan.lead_in);
  return {std::move(block), sequence.history()};
}

}  // namespace meki::bench
