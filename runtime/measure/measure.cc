#include "runtime/measure/measure.h"

#include <random>
#include <stdexcept>
#include <string>

namespace meki::bench {
namespace {

constexpr size_t kDepth = 10240;  // the paper's
constexpr size_t kPrefill = 512;
constexpr size_t kStarts = 100;  // tokens from which a generation may start, tried when the model ends its text

void require_fit(size_t count, size_t most, const std::string& what, size_t context) {
  if (count <= most) return;
  throw std::invalid_argument(what + " is " + std::to_string(count) + " tokens, expected at most " +
                              std::to_string(most) + ": the context is " + std::to_string(context));
}

// Pseudo-random token ids, the same at every call.
std::vector<int64_t> random_ids(size_t count, size_t vocab_size) {
  std::mt19937_64 random(20260203);
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % vocab_size);
  return ids;
}

double per_second(uint64_t tokens, uint64_t expected, uint64_t ns) {
  if (tokens != expected || ns == 0) {
    throw std::runtime_error("the engine counted " + std::to_string(tokens) + " tokens in " + std::to_string(ns) +
                             " ns, expected " + std::to_string(expected) + " tokens; the measurement is void");
  }
  return static_cast<double>(tokens) * 1e9 / static_cast<double>(ns);
}

// The session that is measured.
class Subject {
 public:
  Subject(const std::shared_ptr<const Engine>& engine, const Plan& plan, const Session::Poll& poll)
      : engine_(engine),
        plan_(plan),
        poll_(poll),
        starts_(random_ids(kStarts, engine->manifest().architecture.vocab_size)),
        session_(engine, {.context = plan.context()}) {}

  // Computes the prefill from an empty cache; tokens/s.
  double prefill() {
    session_.rewind(0);
    session_.prompt(random_ids(plan_.prefill, engine_->manifest().architecture.vocab_size));
    session_.start(kGreedy, 1);
    session_.reset_stats();
    static_cast<void>(step());
    const Stats stats = session_.stats();
    return per_second(stats.prefill_tokens, plan_.prefill, stats.prefill_ns);
  }

  // Fills the cache for decode.
  void fill() {
    session_.rewind(0);
    session_.fill_synthetic(plan_.filled());
  }

  // Decodes from the depth; the statistics are those of the round's steps. Every round decodes the same tokens.
  Stats decode() {
    next_start_ = 0;
    begin();
    session_.reset_stats();
    for (size_t count = 0; count < plan_.tokens; ++count) {
      if (!step()) begin();  // the step was computed, but ended the text
    }
    return session_.stats();
  }

 private:
  static constexpr SamplingOptions kGreedy{.temperature = 0};

  // One step; whether it made a token. A cold ROM is dropped before it, and so before the request for the rows of the
  // next one.
  bool step() {
    poll_();
    if (plan_.cold) engine_->rows()->drop_cache();
    return session_.next(poll_).has_value();
  }

  // Computes the last token of the depth and has the next one pending. No decode step in the statistics.
  void begin() {
    for (size_t tries = 0; tries < kStarts; ++tries) {
      session_.rewind(plan_.filled());
      session_.prompt(std::span(starts_).subspan(next_start_++ % kStarts, 1));
      session_.start(kGreedy, 0);
      if (step()) return;
    }
    throw std::runtime_error("the model ends its text after every one of " + std::to_string(kStarts) +
                             " pseudo-random tokens, so that no decode step can be measured; measure a package whose "
                             "manifest names no end token (tokenizer.eos_token_ids)");
  }

  const std::shared_ptr<const Engine> engine_;
  const Plan plan_;
  const Session::Poll poll_;
  const std::vector<int64_t> starts_;
  Session session_;
  size_t next_start_ = 0;
};

}  // namespace

Plan make_plan(const Options& options, size_t context) {
  require_fit(options.tokens, context - std::min<size_t>(context, 2), "--tokens", context);
  Plan plan{.tokens = options.tokens, .repetitions = options.repetitions, .cold = options.cold};
  plan.prefill = options.prefill.value_or(std::min(kPrefill, context - 1));
  require_fit(plan.prefill, context - 1, "--prefill", context);
  const size_t deepest = context - plan.tokens - 1;
  plan.depth = options.depth.value_or(std::min(kDepth, deepest));
  require_fit(plan.depth, deepest, "--depth with --tokens " + std::to_string(plan.tokens), context);
  return plan;
}

Measurement measure(const std::shared_ptr<const Engine>& engine, const Plan& plan, const Session::Poll& poll) {
  Subject subject(engine, plan, poll);
  Measurement result;
  if (plan.prefill > 0) {
    subject.prefill();
    for (size_t round = 0; round < plan.repetitions; ++round) result.prefill_tokens_per_s.push_back(subject.prefill());
  }
  subject.fill();
  subject.decode();
  uint64_t fetched = 0;
  bool told = true;
  for (size_t round = 0; round < plan.repetitions; ++round) {
    const auto before = storage_bytes();
    const Stats stats = subject.decode();
    const auto after = storage_bytes();
    result.decode_tokens_per_s.push_back(per_second(stats.decode_tokens, plan.tokens, stats.decode_ns));
    for (const uint64_t ns : stats.stall_ns) result.stall_us.push_back(static_cast<double>(ns) / 1000);
    told = told && before && after;
    if (told) fetched += *after - *before;
  }
  if (told) {
    result.storage_bytes_per_token = static_cast<double>(fetched) / static_cast<double>(plan.repetitions * plan.tokens);
  }
  result.memory = resident_memory();
  return result;
}

std::vector<float> compute_logits(const std::shared_ptr<const Engine>& engine, const std::vector<int64_t>& ids,
                                  const Session::Poll& poll) {
  Session session(engine, {.context = ids.size()});
  session.prompt(ids);
  std::vector<float> logits(ids.size() * engine->manifest().architecture.vocab_size);
  session.logits(logits.data(), poll);
  return logits;
}

}  // namespace meki::bench
