#include "runtime/measure/sequence.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>

#include "runtime/measure/process.h"

namespace meki::bench {
namespace {

const SamplingOptions kGreedy{.temperature = 0};
constexpr size_t kStarts = 100;  // tokens from which a generation may start, tried when the model ends its text

// Pseudo-random token ids, the same at every call.
std::vector<int64_t> random_ids(const Engine& engine, size_t count) {
  std::mt19937_64 random(20260203);
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % engine.manifest().architecture.vocab_size);
  return ids;
}

void check_count(const std::string& kind, uint64_t got, size_t expected) {
  if (got == expected) return;
  throw std::runtime_error("the engine counted " + std::to_string(got) + " " + kind + " tokens, expected " +
                           std::to_string(expected) + "; the measurement is void");
}

std::optional<uint64_t> since(std::optional<uint64_t> stored) {
  const auto now = storage_bytes();
  return stored && now ? std::optional(*now - *stored) : std::nullopt;
}

}  // namespace

size_t decode_context(size_t depth, size_t steps) { return std::max<size_t>(depth, 1) + steps + 1; }

PrefillSequence::PrefillSequence(const std::shared_ptr<const Engine>& engine, size_t tokens, StepHooks hooks)
    : hooks_(std::move(hooks)),
      has_rows_(engine->rows() != nullptr),
      ids_(random_ids(*engine, tokens)),
      session_(engine, {.context = tokens + 1}) {}

Block PrefillSequence::run() {
  session_.rewind(0);
  session_.append(ids_);
  session_.start(kGreedy, 1);
  session_.reset_stats();
  hooks_.before_step();
  const auto stored = storage_bytes();
  session_.next(hooks_.poll);
  const Stats stats = session_.stats();
  check_count("prefill", stats.prefill_tokens, ids_.size());
  Block block{.tokens = ids_.size(), .ns = stats.prefill_ns, .rows = stats.rows, .storage_bytes = since(stored)};
  if (has_rows_) block.stall_ns = {stats.prefill_stall_ns / stats.prefill_tokens};
  return block;
}

DecodeSequence::DecodeSequence(const std::shared_ptr<const Engine>& engine, size_t depth, size_t steps, bool synthetic,
                               StepHooks hooks)
    : hooks_(std::move(hooks)),
      synthetic_(synthetic),
      base_(std::max<size_t>(depth, 1) - 1),
      starts_(random_ids(*engine, kStarts)),
      session_(engine, {.context = decode_context(depth, steps)}) {
  if (synthetic) {
    session_.fill_synthetic(base_);
  } else {
    session_.append(random_ids(*engine, base_));
    session_.compute(hooks_.poll);
  }
}

void DecodeSequence::rewind() {
  next_start_ = 0;
  begin();
}

Block DecodeSequence::decode(size_t tokens, size_t lead_in) {
  for (size_t count = 0; count < lead_in; ++count) step(false);
  session_.reset_stats();
  const auto stored = storage_bytes();
  for (size_t count = 0; count < tokens; ++count) step(true);
  const Stats stats = session_.stats();
  check_count("decode", stats.decode_tokens, tokens);
  return {tokens, stats.decode_ns, stats.sample_ns, stats.stall_ns, stats.rows, since(stored)};
}

void DecodeSequence::step(bool counted) {
  hooks_.before_step();
  history_.push_back(counted);
  if (!session_.next(hooks_.poll)) begin();  // the step was computed, but ended the text
}

// Computes the last token of the depth and has the next one pending. No decode step in the statistics.
void DecodeSequence::begin() {
  for (size_t tries = 0; tries < kStarts; ++tries) {
    session_.rewind(base_);
    if (synthetic_ && session_.pending() > 0) {  // a ring does not reach back so far: filled again, not computed
      session_.rewind(0);
      session_.fill_synthetic(base_);
    }
    session_.append(std::span(starts_).subspan(next_start_++ % kStarts, 1));
    session_.start(kGreedy, 0);
    hooks_.before_step();
    history_.push_back(false);
    if (session_.next(hooks_.poll)) return;
  }
  throw std::runtime_error("the model ends its text after every one of " + std::to_string(kStarts) +
                           " pseudo-random tokens, so that no decode step can be measured; measure a package whose "
                           "manifest names no end token (tokenizer.eos_token_ids)");
}

}  // namespace meki::bench
