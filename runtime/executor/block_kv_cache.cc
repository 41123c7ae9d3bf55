#include "runtime/executor/block_kv_cache.h"

#include <algorithm>
#include <random>

#include "runtime/base/checked.h"
#include "runtime/executor/stages.h"

namespace meki {

BlockKvCache::BlockKvCache(const KvLayout& layout, size_t layers, size_t context)
    : layout_(layout),
      layers_(layers),
      // At most 2^20 kv heads, 2^25 blocks and 2^18 bytes a block: no overflow here, but perhaps in the product below.
      layer_bytes_(layout_.bytes(context)) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = layer_bytes_ >= 4 * kHugePage;  // else the part-filled pages would outweigh the rest
  if (huge) layer_bytes_ = (layer_bytes_ + kHugePage - 1) / kHugePage * kHugePage;
  memory_ = allocate(checked_mul(layer_bytes_, layers), "the KV cache of " + std::to_string(context) + " tokens");
  if (huge) memory_.prefer_huge_pages();
}

// A layer's blocks lie in the order of their positions: the first bytes(n) are those of the first n tokens.
std::vector<std::byte> BlockKvCache::snapshot() const {
  std::vector<std::byte> copy(bytes(length_));
  copy_to(copy.data());
  return copy;
}

void BlockKvCache::copy_to(std::byte* snapshot) const {
  const size_t used = layout_.bytes(length_);
  for (size_t index = 0; index < layers_; ++index) std::copy_n(layer(index), used, snapshot + index * used);
}

void BlockKvCache::restore(std::span<const std::byte> snapshot, size_t length) {
  const size_t used = layout_.bytes(length);
  if (used > layer_bytes_ || snapshot.size() != layers_ * used) {
    throw bad_snapshot(snapshot.size(), layers_ * used, length);
  }
  for (size_t index = 0; index < layers_; ++index) std::copy_n(snapshot.data() + index * used, used, layer(index));
  length_ = length;
}

void BlockKvCache::append_noise(size_t tokens) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> pool(8191 + layout_.head_dim);
  for (float& value : pool) value = normal(random);
  const auto row = [&] { return pool.data() + random() % 8191; };
  for (size_t index = 0; index < layers_; ++index) {
    for (size_t position = length_; position < length_ + tokens; ++position) {
      for (size_t head = 0; head < layout_.kv_heads; ++head) {
        meki::append(layout_, layer(index) + layout_.block_offset(head, position), position % KvLayout::kBlock, row(),
                     row());
      }
    }
  }
  length_ += tokens;
}

Tensor BlockKvCache::tensor(const std::string& name, size_t index) const {
  const size_t block = layout_.block_bytes();
  return {name,
          ElementType::uint8,
          {static_cast<int64_t>(layer_bytes_ / layout_.kv_heads / block), static_cast<int64_t>(layout_.kv_heads),
           static_cast<int64_t>(block)},
          layer(index)};
}

}  // namespace meki
