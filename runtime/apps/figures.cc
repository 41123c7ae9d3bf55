#include "runtime/apps/figures.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "runtime/measure/measure.h"

namespace meki::bench {
namespace {

constexpr size_t kDepth = 10240;  // the paper's
constexpr size_t kPrefill = 512;

void require_fit(size_t count, size_t most, const std::string& what, size_t context) {
  if (count <= most) return;
  throw std::invalid_argument(what + " is " + std::to_string(count) + " tokens, expected at most " +
                              std::to_string(most) + ": the context is " + std::to_string(context));
}

// The blocks of the one contender's one test, a round each.
std::vector<Block> measure_test(const std::shared_ptr<const Engine>& engine, const Plan& plan,
                                const Session::Poll& poll, Figures& figures) {
  Measurement measurement = measure({&engine, 1}, plan, {.poll = poll});
  figures.memory = measurement.memory;
  std::vector<Block> blocks;
  blocks.reserve(measurement.rounds.size());
  for (std::vector<Blocks>& round : measurement.rounds) blocks.push_back(std::move(round.at(0).at(0).at(0)));
  return blocks;
}

double speed(const Block& block) { return static_cast<double>(block.tokens) * 1e9 / static_cast<double>(block.ns); }

}  // namespace

Plan make_plan(const Options& options, size_t context) {
  require_fit(options.tokens, context - std::min<size_t>(context, 2), "--tokens", context);
  const size_t prefill = options.prefill.value_or(std::min(kPrefill, context - 1));
  require_fit(prefill, context - 1, "--prefill", context);
  const size_t deepest = context - options.tokens - 1;
  const size_t depth = options.depth.value_or(std::min(kDepth, deepest));
  require_fit(depth, deepest, "--depth with --tokens " + std::to_string(options.tokens), context);
  return {.depths = {depth},
          .prefill = prefill,
          .tokens = options.tokens,
          .repetitions = options.repetitions,
          .synthetic_depth = true,
          .cold = options.cold,
          .lead_in = 0};  // a block follows the rewind at once: the rows of its first step have just been requested
}

Figures take_figures(const std::shared_ptr<const Engine>& engine, const Plan& plan, const Session::Poll& poll) {
  Figures figures;
  Plan prefill = plan;  // on its own: on an NPU every session holds the keys and values of the whole context
  prefill.depths.clear();
  Plan decode = plan;
  decode.prefill = 0;
  if (plan.prefill > 0) {
    for (const Block& block : measure_test(engine, prefill, poll, figures)) {
      figures.prefill_tokens_per_s.push_back(speed(block));
    }
  }
  std::optional<uint64_t> fetched = 0;
  RowCounters rows;
  for (const Block& block : measure_test(engine, decode, poll, figures)) {
    figures.decode_tokens_per_s.push_back(speed(block));
    for (const uint64_t ns : block.stall_ns) figures.stall_us.push_back(static_cast<double>(ns) / 1000);
    rows += block.rows;
    fetched = fetched && block.storage_bytes ? std::optional(*fetched + *block.storage_bytes) : std::nullopt;
  }
  if (rows.requests > 0) {
    figures.row_hit_rate = static_cast<double>(rows.hits) / static_cast<double>(rows.requests);
  }
  if (fetched) {
    figures.storage_bytes_per_token =
        static_cast<double>(*fetched) / static_cast<double>(plan.repetitions * plan.tokens);
  }
  return figures;
}

std::vector<float> compute_logits(const std::shared_ptr<const Engine>& engine, const std::vector<int64_t>& ids,
                                  const Session::Poll& poll) {
  Session session(engine, {.context = ids.size()});
  session.append(ids);
  std::vector<float> logits(ids.size() * engine->manifest().architecture.vocab_size);
  session.logits(0, logits.data(), poll);
  return logits;
}

}  // namespace meki::bench
