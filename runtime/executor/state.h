#pragma once

#include <cstddef>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace meki {

// What a sequence leaves behind for its next tokens: the KV cache, and whatever else stages carry from step to step.
// For one thread at a time.
class SequenceState {
 public:
  virtual ~SequenceState() = default;

  // Tokens that it holds.
  size_t length() const { return length_; }
  // Takes what a step of `tokens` tokens has computed.
  virtual void append(size_t tokens) = 0;
  // Keeps the first `length` tokens, or fewer where it cannot go back to there: the rest is to be computed again.
  // length <= length().
  virtual void truncate(size_t length) = 0;

  // Whether a snapshot of the first `length` tokens can be taken: what the last of them and the next one see is there.
  // length <= length(); true for length() itself.
  virtual bool reaches(size_t length) const = 0;
  // A copy of what there is of the first `length` tokens, for restore() of a state of the same model, context and type:
  // of this backend or of another one with the same. Only where reaches(length).
  virtual std::vector<std::byte> snapshot(size_t length) const = 0;
  // Bytes of a snapshot of `length` tokens.
  virtual size_t snapshot_bytes(size_t length) const = 0;
  // Becomes what the snapshot of a state of `length` tokens was made of. Throws std::invalid_argument if the snapshot
  // does not have the size of such a state.
  virtual void restore(std::span<const std::byte> snapshot, size_t length) = 0;

  // Bytes that a step reads after `tokens` tokens, all layers together.
  virtual size_t bytes(size_t tokens) const = 0;
  // Appends pseudo-random content of `tokens` tokens, as if it had been computed: for measurements.
  virtual void append_noise(size_t tokens) = 0;

 protected:
  static std::invalid_argument bad_snapshot(size_t got, size_t expected, size_t length) {
    return std::invalid_argument("a snapshot of " + std::to_string(length) + " tokens has " + std::to_string(got) +
                                 " bytes, expected " + std::to_string(expected) +
                                 " in a large enough context; restore it in a session like the one that made it");
  }

  size_t length_ = 0;
};

}  // namespace meki
