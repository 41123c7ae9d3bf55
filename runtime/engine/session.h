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
#include "runtime/executor/steps.h"

namespace meki {

struct SessionOptions {
  size_t context = 0;    // capacity of the KV cache in tokens; 0: the engine's context, at most kDefaultContext
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

// One sequence: its tokens, KV cache and prefetcher. Mutable; use from one thread at a time. Sessions of one engine are
// independent of each other.
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
  void prompt(std::span<const int64_t> ids);

  // Begins a generation after the sequence. max_new_tokens 0: until the context is full. Throws std::invalid_argument
  // for bad options or an empty sequence.
  void start(const SamplingOptions& sampling, size_t max_new_tokens);
  // The decode loop's body: the next token, or nothing when the generation is over. When it returns, the rows of the
  // returned token are already being read. Throws PackageError if the ROM or a stage fails.
  std::optional<int32_t> next(const Poll& poll = {});
  FinishReason finish_reason() const { return finish_reason_; }

  // Number of tokens that are not computed yet.
  size_t pending() const { return tokens_.size() - computed_; }
  // Computes the pending tokens and writes their logits, float32 [pending(), vocab_size].
  void logits(float* out, const Poll& poll = {});

  // Keeps the first `length` tokens. Throws std::invalid_argument if there are fewer.
  void rewind(size_t length);

  // Appends `count` arbitrary tokens as if they had been computed: their keys and values are pseudo-random. For
  // measurements at a depth, whose text means nothing. Throws std::invalid_argument if they exceed the context or if
  // tokens are pending.
  void fill_synthetic(size_t count);
  // Bytes of the KV cache, all layers together, that a step reads after `tokens` tokens.
  size_t kv_bytes(size_t tokens) const { return steps_->cache_bytes(tokens); }

  Stats stats() const;
  void reset_stats();

 private:
  void request_rows(int slot, size_t first, size_t count);
  void check_room(size_t count) const;
  size_t vocab_size() const { return engine_->manifest().architecture.vocab_size; }
  void decode();
  int32_t sample(bool decoding);
  void prefill(float* all_logits, const Poll& poll);
  uint64_t run(size_t tokens, int slot, float* all_logits);

  const std::shared_ptr<const Engine> engine_;
  const size_t context_;
  const size_t chunk_;
  const std::unique_ptr<Steps> steps_;

  std::vector<int32_t> tokens_;
  size_t computed_ = 0;        // tokens whose keys and values are in the cache
  bool rows_begun_ = false;    // the rows of the one pending token are being read into slot 0
  bool logits_valid_ = false;  // the last logits are those of token computed_ - 1

  std::optional<Sampler> sampler_;
  size_t remaining_ = 0;     // tokens that the generation may still make
  bool generating_ = false;  // the pending token was generated: its step is decode, not prefill
  FinishReason finish_reason_ = FinishReason::running;
  Stats stats_;
  RowCounters rom_base_;  // the prefetcher's counters at the last reset
};

}  // namespace meki
