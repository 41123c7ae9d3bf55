#pragma once

#include "runtime/base/file.h"
#include "runtime/executor/state.h"
#include "runtime/graph/graph.h"
#include "runtime/kernels/kv_cache.h"

namespace meki {

// Keys and values in the blocks of our own attention (kernels/kv_cache.h), which updates them in place. Takes memory as
// it fills.
class BlockKvCache final : public SequenceState {
 public:
  // Throws std::runtime_error without memory for `context` tokens.
  BlockKvCache(const KvLayout& layout, size_t layers, size_t context);

  void append(size_t tokens) override { length_ += tokens; }
  void truncate(size_t length) override { length_ = length; }
  std::vector<std::byte> snapshot() const override;
  // Writes the snapshot to bytes(length()) bytes.
  void copy_to(std::byte* snapshot) const;
  void restore(std::span<const std::byte> snapshot, size_t length) override;
  size_t bytes(size_t tokens) const override { return layers_ * layout_.bytes(tokens); }
  void append_noise(size_t tokens) override;

  // The whole cache of a layer, uint8 [blocks, kv_heads, block bytes].
  Tensor tensor(const std::string& name, size_t index) const;

 private:
  std::byte* layer(size_t index) const { return memory_.data() + index * layer_bytes_; }

  const KvLayout layout_;
  const size_t layers_;
  size_t layer_bytes_;
  Mapping memory_;  // [layers, layer_bytes_]
};

}  // namespace meki
