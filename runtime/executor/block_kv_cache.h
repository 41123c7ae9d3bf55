#pragma once

#include <span>

#include "runtime/base/file.h"
#include "runtime/executor/state.h"
#include "runtime/graph/graph.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/package/manifest.h"

namespace meki {

// Keys and values in the blocks of our own attention (kernels/kv_cache.h), which updates them in place. Takes memory as
// it fills. A layer whose tokens see a window keeps the last positions alone, in a ring of blocks: those of the window,
// of a step, and kSlack more, so that a sequence can be taken back that far.
class BlockKvCache final : public SequenceState {
 public:
  static constexpr size_t kSlack = 1024;

  // For steps of up to `chunk` tokens; caches: of each layer. Throws std::runtime_error without memory for `context`
  // tokens.
  BlockKvCache(KvType type, std::span<const KvCacheInfo> caches, size_t context, size_t chunk);

  // Before a step of `tokens` tokens, which may overwrite what a ring has of the oldest.
  void begin(size_t tokens);
  void append(size_t tokens) override { length_ += tokens; }
  // To 0 where a ring does not have any more what the next token sees.
  void truncate(size_t length) override;
  bool reaches(size_t length) const override;
  // Of a ring, what the last token and the next one see.
  std::vector<std::byte> snapshot(size_t length) const override;
  size_t snapshot_bytes(size_t length) const override;
  // Writes the snapshot to snapshot_bytes(length) bytes.
  void copy_to(std::byte* snapshot, size_t length) const;
  void restore(std::span<const std::byte> snapshot, size_t length) override;
  // A cache that several layers see is read by each.
  size_t bytes(size_t tokens) const override;
  void append_noise(size_t tokens) override;

  // After a step of `tokens` tokens that failed: what it has left behind, which may be NaN, becomes 0. Positions that
  // nobody sees must be finite.
  void clear(size_t tokens);

  // The whole cache of layer `index`, as uint8 [blocks, kv_heads, block bytes]; KvLayout has the order.
  Tensor tensor(const std::string& name, size_t index) const;
  std::span<std::byte> memory(size_t index) const {
    const Layer& layer = layers_[index_[index]];
    return {at(layer, 0, 0), layer.blocks * layer.layout.kv_heads * layer.layout.block_bytes()};
  }

 private:
  struct Layer {
    KvLayout layout;
    size_t window;      // 0: all positions
    size_t blocks;      // that it has room for: whole runs
    size_t readers;     // layers that see it
    size_t offset = 0;  // in memory_
    size_t first = 0;   // the oldest position that it has

    // The first block of a snapshot of `length` tokens, from which the last of them can be computed again.
    size_t first_kept(size_t length) const {
      return first_seen(length > 0 ? length - 1 : 0, window) / KvLayout::kBlock;
    }
  };
  // Calls piece(block, bytes) for every block of a snapshot of `length` tokens, in its order.
  template <class Piece>
  void for_blocks(size_t length, Piece piece) const;
  // Stores row(), float32 of a head, as each key and value of the `tokens` positions behind the last.
  template <class Row>
  void write_behind(size_t tokens, Row row);
  // The block of a kv head that has a position.
  std::byte* at(const Layer& layer, size_t head, size_t position) const {
    const size_t within = position % (layer.blocks * KvLayout::kBlock);
    return memory_.data() + layer.offset + layer.layout.block_offset(head, within);
  }

  std::vector<size_t> index_;  // of each layer of the model, in layers_
  std::vector<Layer> layers_;
  Mapping memory_;
};

}  // namespace meki
