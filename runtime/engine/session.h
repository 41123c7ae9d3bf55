#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/engine/drafter.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/sampler.h"
#include "runtime/engine/stats.h"
#include "runtime/rows/prefetcher.h"

namespace meki {

struct SessionOptions {
  size_t context = 0;     // capacity in tokens; 0: the engine's context, at most kDefaultContext
  bool prefetch = true;   // read rows on the I/O thread ahead of their use; false: on the compute thread when needed
  size_t chunk = 256;     // prompt tokens of one prefill step; with Provider::qnn at most those compiled
  MakeDrafter drafter{};  // of speculative decoding; empty: none
  size_t draft_tokens = kDefaultDraftTokens;  // with a drafter: tokens of a draft, at most kMostDraftTokens

  static constexpr size_t kDefaultContext = 4096;
  static constexpr size_t kDefaultDraftTokens = 7;
  // A step of 16 tokens costs about five steps of one: more are not worth it.
  static constexpr size_t kMostDraftTokens = 15;
};

enum class FinishReason {
  running,  // not finished
  eos,      // the model ended the text; the end token is not part of the sequence
  length,   // max_new_tokens reached
  context,  // the KV cache is full
};

// What a session was at one moment. Passive data.
struct Snapshot {
  std::vector<int32_t> tokens;   // those that were computed
  std::vector<std::byte> state;  // as SequenceState::snapshot() has it
};

// One sequence: its tokens, their state (the KV cache) and its prefetcher. Mutable; use from one thread at a time.
// Sessions of one engine are independent of each other. In a forked child, what computes or counts throws
// std::runtime_error.
//
// With a drafter a step may compute tokens beyond the sequence. They are no part of it before next() hands them out;
// whatever else changes or copies the sequence drops those that are left.
class Session {
 public:
  // Called between two prefill steps; when it throws, the session stays usable.
  using Poll = meki::Poll;

  // Throws std::invalid_argument for options outside their limits, std::runtime_error without memory for the cache (the
  // message says how much), std::bad_alloc without memory for anything else.
  Session(std::shared_ptr<const Engine> engine, const SessionOptions& options);

  size_t context() const { return context_; }
  // Prompts and generated tokens so far.
  std::span<const int32_t> tokens() const { return std::span(tokens_).first(length_); }

  // Appends tokens and ends a running generation; the next call that needs the tokens computes them. Throws
  // std::invalid_argument for an id outside the vocabulary or a sequence longer than the context; then nothing is
  // appended.
  void append(std::span<const int64_t> ids);

  // Begins a generation after the sequence. max_new_tokens 0: until the context is full. Each of `end_token_ids` ends
  // it; null: of the manifest's. Throws std::invalid_argument for bad options or an empty sequence.
  void start(const SamplingOptions& sampling, size_t max_new_tokens,
             std::optional<std::vector<int32_t>> end_token_ids = std::nullopt);
  // The decode loop's body: the next token, or nothing when the generation is over. When it returns, the rows of the
  // returned token are already being read. allowed: as of Sampler::sample, which throws for it; the same call with
  // another set then goes on. Throws PackageError if the rows or a stage fail, also of a draft model; what only drafted
  // tokens need is no failure.
  std::optional<int32_t> next(const Poll& poll = {}, std::optional<TokenSet> allowed = std::nullopt);
  // Computes what next() chooses from, for a caller to whom the allowed tokens become known meanwhile; next() does it
  // where this was not called. Throws as next().
  void step(const Poll& poll = {});
  // step() of distinct sessions at once: where each has one pending token and no drafter, those of an engine go through
  // the stages together, whose weights are then read once for all; the others take their steps one after the other.
  // Logits are those of single steps, to the bit where weights are packed. A session whose step fails with PackageError
  // is left as it is: its next() tries again, and throws. The time of a shared step counts in the statistics of each.
  // Throws what step() throws otherwise.
  static void step_together(std::span<Session* const> sessions, const Poll& poll = {});
  // Of the token that next() returned last; null without SamplingOptions::logprobs or a generation.
  std::optional<Logprobs> logprobs() const { return sampler_ ? sampler_->logprobs() : std::nullopt; }
  FinishReason finish_reason() const { return finish_reason_; }

  // Number of tokens that are not computed yet.
  size_t pending() const { return length_ - computed(); }
  // Computes the pending tokens.
  void compute(const Poll& poll = {}) { compute(length_, poll); }
  // The first `most` of them, or all if there are fewer.
  void compute(size_t most, const Poll& poll = {}) { prefill(std::min(most, pending()), length_, nullptr, poll); }
  // The same, and writes the logits of tokens[first] and all behind it, float32 [tokens().size() - first, vocab_size].
  // Throws std::invalid_argument unless tokens[first] is pending, or first is tokens().size(): then there are none.
  void logits(size_t first, float* out, const Poll& poll = {});

  // Keeps the first `length` tokens; where the state does not reach back to there (SequenceState::truncate), more than
  // these are pending. Throws std::invalid_argument if there are fewer.
  void rewind(size_t length);
  // A copy of the first `length` tokens, all of which are computed, and their state; of no token where the state does
  // not reach back to there. Throws std::invalid_argument if fewer are computed.
  Snapshot snapshot(size_t length);
  // Of all computed tokens.
  Snapshot snapshot() { return snapshot(computed()); }
  // Bytes of the state in a snapshot of `length` tokens. Throws std::invalid_argument for more than the context holds.
  size_t snapshot_bytes(size_t length) const;
  // Becomes what a snapshot holds, which a session of the same package, provider, KV type and, with Provider::qnn,
  // context made; ends a running generation. Throws std::invalid_argument if it does not fit, or a token is outside the
  // vocabulary; then nothing changes.
  void restore(std::span<const int32_t> tokens, std::span<const std::byte> state);
  void restore(const Snapshot& snapshot) { restore(snapshot.tokens, snapshot.state); }

  // Appends `count` arbitrary tokens as if they had been computed: their keys and values are pseudo-random. For
  // measurements at a depth, whose text means nothing. Throws std::invalid_argument if they exceed the context or if
  // tokens are pending.
  void fill_synthetic(size_t count);
  // Bytes of the state, all layers together, that a step reads after `tokens` tokens.
  size_t kv_bytes(size_t tokens) const { return executor_->state().bytes(tokens); }

  Stats stats() const;
  void reset_stats();

 private:
  void check_token(int64_t id) const;
  void check_room(size_t count) const;
  size_t vocab_size() const { return engine_->manifest().architecture.vocab_size; }
  size_t computed() const { return std::min(executor_->state().length(), length_); }
  size_t drafted() const { return tokens_.size() - length_; }
  void end_generation();
  void draft(const Poll& poll);
  void drop_draft();
  RowRequest request_rows(size_t first, size_t count);
  void decode(const Poll& poll);
  uint64_t decode_step();
  int32_t sample(bool decoding, std::optional<TokenSet> allowed);
  void take(int32_t token);
  void prefill(size_t count, size_t first, float* out, const Poll& poll);
  bool joins(const Engine& engine) const;
  void step_or_leave(const Poll& poll);
  static void run_batch(std::span<Session* const> sessions, const Poll& poll);
  void take_step(const BatchMember& member, uint64_t ns);
  uint64_t run(size_t tokens, RowRequest& rows, size_t logits_from, float* out);

  const std::shared_ptr<const Engine> engine_;
  const size_t context_;
  const std::unique_ptr<Executor> executor_;
  const std::unique_ptr<Prefetcher> prefetcher_;  // null in a dense model
  const std::unique_ptr<Drafter> drafter_;        // null: none
  const Mapping draft_logits_;                    // of a step with a draft, float32 [draft_tokens + 1, vocab_size]

  std::vector<int32_t> tokens_;  // the sequence, and behind it what is drafted and not decided: computed or about to be
  size_t length_ = 0;            // of the sequence
  RowRequest rows_;              // of the one pending token of a generation and the draft behind it
  std::span<const float> logits_;  // of the last computed token of the sequence; empty: they are not there
  DraftLength draft_length_;
  size_t draft_size_ = 0;  // of the last draft, before any of it was decided

  std::optional<Sampler> sampler_;
  std::vector<int32_t> end_token_ids_;
  size_t remaining_ = 0;     // tokens that the generation may still make
  bool generating_ = false;  // the pending token was generated: its step is decode, not prefill
  FinishReason finish_reason_ = FinishReason::running;
  Stats stats_;
  RowCounters rows_base_;  // the prefetcher's counters at the last reset
};

}  // namespace meki
