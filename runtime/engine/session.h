#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/engine/sampler.h"
#include "runtime/engine/stats.h"
#include "runtime/rows/prefetcher.h"

namespace meki {

struct SessionOptions {
  size_t context = 0;    // capacity in tokens; 0: the engine's context, at most kDefaultContext
  bool prefetch = true;  // read rows on the I/O thread ahead of their use; false: on the compute thread when needed
  size_t chunk = 256;    // prompt tokens of one prefill step; with Provider::qnn at most those compiled

  static constexpr size_t kDefaultContext = 4096;
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
class Session {
 public:
  // Called between two prefill steps; may throw to interrupt. The session stays usable.
  using Poll = std::function<void()>;

  // Throws std::invalid_argument for options outside their limits, std::runtime_error without memory for the cache (the
  // message says how much), std::bad_alloc without memory for anything else.
  Session(std::shared_ptr<const Engine> engine, const SessionOptions& options);

  size_t context() const { return context_; }
  // Prompts and generated tokens so far.
  std::span<const int32_t> tokens() const { return tokens_; }

  // Appends tokens and ends a running generation; the next call that needs the tokens computes them. Throws
  // std::invalid_argument for an id outside the vocabulary or a sequence longer than the context; then nothing is
  // appended.
  void append(std::span<const int64_t> ids);

  // Begins a generation after the sequence. max_new_tokens 0: until the context is full. Each of `end_token_ids` ends
  // it; null: of the manifest's. Throws std::invalid_argument for bad options or an empty sequence.
  void start(const SamplingOptions& sampling, size_t max_new_tokens,
             std::optional<std::vector<int32_t>> end_token_ids = std::nullopt);
  // The decode loop's body: the next token, or nothing when the generation is over. When it returns, the rows of the
  // returned token are already being read. Throws PackageError if the rows or a stage fail.
  std::optional<int32_t> next(const Poll& poll = {});
  FinishReason finish_reason() const { return finish_reason_; }

  // Number of tokens that are not computed yet.
  size_t pending() const { return tokens_.size() - computed(); }
  // Computes the pending tokens.
  void compute(const Poll& poll = {}) { prefill(tokens_.size(), nullptr, poll); }
  // The same, and writes the logits of tokens[first] and all behind it, float32 [tokens().size() - first, vocab_size].
  // Throws std::invalid_argument unless tokens[first] is pending, or first is tokens().size(): then there are none.
  void logits(size_t first, float* out, const Poll& poll = {});

  // Keeps the first `length` tokens; where the state does not reach back to there (SequenceState::truncate), more than
  // these are pending. Throws std::invalid_argument if there are fewer.
  void rewind(size_t length);
  // A copy of the computed tokens and their state; pending ones are not part of it.
  Snapshot snapshot() const;
  // Becomes what `snapshot` holds, which a session of the same package, provider, KV type and, with Provider::qnn,
  // context made; ends a running generation. Throws std::invalid_argument if it does not fit; then nothing changes.
  void restore(const Snapshot& snapshot);

  // Appends `count` arbitrary tokens as if they had been computed: their keys and values are pseudo-random. For
  // measurements at a depth, whose text means nothing. Throws std::invalid_argument if they exceed the context or if
  // tokens are pending.
  void fill_synthetic(size_t count);
  // Bytes of the state, all layers together, that a step reads after `tokens` tokens.
  size_t kv_bytes(size_t tokens) const { return executor_->state().bytes(tokens); }

  Stats stats() const;
  void reset_stats();

 private:
  void check_room(size_t count) const;
  size_t vocab_size() const { return engine_->manifest().architecture.vocab_size; }
  size_t computed() const { return executor_->state().length(); }
  void end_generation();
  RowRequest request_rows(size_t first, size_t count);
  void decode();
  int32_t sample(bool decoding);
  void prefill(size_t first, float* out, const Poll& poll);
  uint64_t run(size_t tokens, RowRequest& rows, size_t logits_from, float* out);

  const std::shared_ptr<const Engine> engine_;
  const size_t context_;
  const std::unique_ptr<Executor> executor_;
  const std::unique_ptr<Prefetcher> prefetcher_;  // null in a dense model

  std::vector<int32_t> tokens_;
  RowRequest rows_;            // of the one pending token of a generation
  bool logits_valid_ = false;  // the last logits are those of the last computed token

  std::optional<Sampler> sampler_;
  std::vector<int32_t> end_token_ids_;
  size_t remaining_ = 0;     // tokens that the generation may still make
  bool generating_ = false;  // the pending token was generated: its step is decode, not prefill
  FinishReason finish_reason_ = FinishReason::running;
  Stats stats_;
  RowCounters rows_base_;  // the prefetcher's counters at the last reset
};

}  // namespace meki
