#pragma once

#include "runtime/executor/block_kv_cache.h"

namespace meki {

// What the convolutions of a sequence have seen, for every token: whichever token it is taken back to, its next one
// finds what it needs. Takes memory as it fills.
class ConvolutionCache {
 public:
  // For `context` tokens of `token_bytes` a layer. Throws std::runtime_error without memory.
  ConvolutionCache(size_t layers, size_t token_bytes, size_t context);

  // Of a copy of the first `tokens` tokens.
  size_t bytes(size_t tokens) const { return layers_ * token_bytes_ * tokens; }
  void copy_to(std::byte* snapshot, size_t tokens) const;
  void copy_from(const std::byte* snapshot, size_t tokens);
  size_t context() const { return context_; }

  // uint8 [context, token_bytes].
  Tensor tensor(const std::string& name, size_t index) const;
  std::span<std::byte> memory(size_t index) const { return {layer(index), token_bytes_ * context_}; }

 private:
  std::byte* layer(size_t index) const { return memory_.data() + index * token_bytes_ * context_; }

  const size_t layers_;
  const size_t token_bytes_;
  const size_t context_;
  Mapping memory_;  // [layers, context, token_bytes]; nothing without layers
};

// The state of a sequence on the CPU: keys and values, and the inputs of the convolutions, if there are any.
class DynamicState final : public SequenceState {
 public:
  DynamicState(BlockKvCache kv_cache, ConvolutionCache convolutions);

  // Before a step of `tokens` tokens.
  void begin(size_t tokens) { kv_cache_.begin(tokens); }
  void append(size_t tokens) override;
  void truncate(size_t length) override;
  bool reaches(size_t length) const override { return kv_cache_.reaches(length); }
  std::vector<std::byte> snapshot(size_t length) const override;
  size_t snapshot_bytes(size_t length) const override;
  void restore(std::span<const std::byte> snapshot, size_t length) override;
  // Of keys and values: a convolution reads a few tokens, however many there are.
  size_t bytes(size_t tokens) const override { return kv_cache_.bytes(tokens); }
  // Of keys and values alone: what a convolution sees does not matter for its speed.
  void append_noise(size_t tokens) override;

  // After a step of `tokens` tokens that failed.
  void clear(size_t tokens) { kv_cache_.clear(tokens); }

  const BlockKvCache& kv_cache() const { return kv_cache_; }
  const ConvolutionCache& convolutions() const { return convolutions_; }

 private:
  BlockKvCache kv_cache_;
  ConvolutionCache convolutions_;
};

}  // namespace meki
