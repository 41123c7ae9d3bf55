#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

#include "runtime/base/file.h"
#include "runtime/executor/state.h"
#include "runtime/rows/prefetcher.h"

namespace meki {

class Executor;

// Some tokens that go through all stages at once, behind those in the state.
struct Step {
  std::span<const int32_t> tokens;  // 1 to Executor::chunk() of them
  RowRequest* rows = nullptr;       // theirs, of Executor::width() tokens; null in a dense model
  size_t logits_from = 0;           // with `logits`: wanted of tokens[logits_from] and all behind it
  float* logits = nullptr;          // float32 [tokens.size() - logits_from, vocab_size]; null: of the last token alone
};

// The next token of one sequence, in a step that several sequences take together.
struct BatchMember {
  Executor* executor = nullptr;
  int32_t token = 0;
  RowRequest* rows = nullptr;  // of the token; null in a dense model
  uint64_t stall = 0;          // nanoseconds that the step waited for them
  bool computed = false;       // by the step: the state has the token, last_logits() are its
};

// How the tokens of one sequence go through the stages of a backend: the memory that these read and write, and the
// state of the sequence. For one thread at a time. Its backend outlives it.
class Executor {
 public:
  virtual ~Executor() = default;

  // Tokens of the longest step.
  size_t chunk() const { return chunk_; }
  // Tokens whose rows a step of `tokens` tokens takes: more than these where its stages are padded.
  virtual size_t width(size_t tokens) const = 0;
  // Binds the memory of decode steps, so that none of them allocates; `rows` as in the steps to come, null in a dense
  // model. Throws PackageError.
  virtual void prepare(const Prefetcher* rows) = 0;
  // Runs a step; afterwards the state has its tokens. Rows are waited for just before the first stage that takes some;
  // returns the nanoseconds of it. Throws PackageError; the state is then as before,
  // but that it may reach less far back.
  virtual uint64_t run(const Step& step) = 0;
  // Of the last token of the last step, float32 [vocab_size].
  std::span<const float> last_logits() const { return {logits_.as<float>(), logits_.size() / sizeof(float)}; }
  // Takes those of a token that a BatchExecutor has computed.
  void take_logits(std::span<const float> logits) { std::copy(logits.begin(), logits.end(), logits_.as<float>()); }

  virtual SequenceState& state() = 0;
  const SequenceState& state() const { return const_cast<Executor*>(this)->state(); }

 protected:
  // `package` is for messages.
  Executor(std::filesystem::path package, size_t vocab_size, size_t chunk);
  // Throws PackageError if there is a NaN in them.
  void check_logits(std::span<const float> logits) const;

  const std::filesystem::path package_;
  const Mapping logits_;

 private:
  const size_t chunk_;
};

// Steps of several sequences, one token of each. For one thread at a time. Its backend outlives it.
class BatchExecutor {
 public:
  static constexpr size_t kMost = 16;  // members of a step

  virtual ~BatchExecutor() = default;
  // Takes a step, of 1 to kMost sequences of the backend's executors. What fails for some of them, their rows or NaN
  // among their logits, does not concern the others; where a stage fails, no member is computed. Why, a step of one's
  // own tells: the states of those that are not computed are as before, but that they may reach less far back.
  // Allocates nothing where steps of so many were taken before.
  virtual void run(std::span<BatchMember> members) = 0;
};

}  // namespace meki
