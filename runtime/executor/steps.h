#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/engine/engine.h"
#include "runtime/rows/prefetcher.h"

namespace meki {

// Some tokens that go through all stages at once.
struct Step {
  std::span<const int32_t> tokens;  // at least one
  size_t past = 0;                  // tokens in the cache before them
  int slot = 0;                     // into which their rows were requested
  float* all_logits = nullptr;      // if not null, float32 [tokens, vocab_size]: wanted of every token, not of the last
};

// How the tokens of one session go through the stages of its engine: the memory that these read and write, the KV cache
// among it, and the rows that they wait for. For one thread at a time. The engine outlives it.
class Steps {
 public:
  virtual ~Steps() = default;

  // Begins to read the rows of a later step, the tokens of `sequence` from `first` on, into `slot`; nothing in a dense
  // model.
  virtual void request(int slot, std::span<const int32_t> sequence, size_t first);
  // Runs a step whose rows were requested; afterwards the cache has `past + tokens` tokens. Rows are waited for just
  // before the first stage that takes some; returns the nanoseconds of it. Throws PackageError; the first `past` tokens
  // of the cache are then as before.
  virtual uint64_t run(const Step& step) = 0;
  // Of the last token of the last step, float32 [vocab_size].
  std::span<const float> last_logits() const { return {logits_.as<float>(), logits_.size() / sizeof(float)}; }

  // Bytes of the cache, all layers together, that a step reads after `tokens` tokens.
  virtual size_t cache_bytes(size_t tokens) const = 0;
  // Fills positions first .. last - 1 of all layers with pseudo-random keys and values.
  virtual void fill_cache(size_t first, size_t last) = 0;

  bool has_rows() const { return prefetcher_ != nullptr; }
  RowCounters row_counters() const { return has_rows() ? prefetcher_->counters() : RowCounters(); }

 protected:
  static constexpr size_t kSlots = 2;
  using Bindings = std::vector<std::unique_ptr<Binding>>;  // of the stages, in order

  explicit Steps(const Engine& engine);
  // Makes `rows` and `request` work, for steps of up to `max_tokens` tokens.
  void open_rows(size_t max_tokens, bool prefetch);
  // The rows of a buffer, float32 [layers, tokens, memory_dim]; null in a dense model.
  float* rows(size_t buffer) const { return has_rows() ? prefetcher_->rows(buffer) : nullptr; }
  // Which buffer a slot's request holds.
  size_t buffer(int slot) const { return requests_[static_cast<size_t>(slot)].buffer(); }
  void request_rows(int slot, std::span<const int32_t> sequence, size_t first, size_t width);
  uint64_t run_stages(const std::vector<Stage>& stages, const Bindings& bindings, int slot);
  // Throws PackageError if there is a NaN in them.
  void check_logits(std::span<const float> logits) const;

  const Engine& engine_;
  const Mapping logits_;

 private:
  std::unique_ptr<Prefetcher> prefetcher_;  // null in a dense model
  std::array<RowRequest, kSlots> requests_;
};

// The steps of a session with room for `context` tokens, of up to `chunk` tokens each. With `prefetch`, rows are read
// on an I/O thread. Throws std::runtime_error without memory for the cache, std::bad_alloc without memory for anything
// else.
std::unique_ptr<Steps> make_steps(const Engine& engine, size_t context, size_t chunk, bool prefetch);

// Zeroed memory for `what`, or std::runtime_error that says how much it needs (nothing: more than 64 bits hold).
Mapping allocate(std::optional<uint64_t> bytes, const std::string& what);

}  // namespace meki
