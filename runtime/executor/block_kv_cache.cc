#include "runtime/executor/block_kv_cache.h"

#include <algorithm>
#include <optional>
#include <random>

#include "runtime/base/checked.h"
#include "runtime/executor/stages.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;

size_t blocks_of(size_t positions) { return (positions + kBlock - 1) / kBlock; }

}  // namespace

BlockKvCache::BlockKvCache(KvType type, std::span<const KvCacheInfo> caches, size_t context, size_t chunk) {
  constexpr size_t kHugePage = size_t{2} << 20;
  std::optional<uint64_t> bytes = 0;
  for (const KvCacheInfo& its : caches) {
    if (its.shared) {
      index_.push_back(index_[*its.shared]);
      ++layers_[index_.back()].readers;
      continue;
    }
    index_.push_back(layers_.size());
    const size_t ring = its.window + chunk + kSlack + kBlock;  // neither end need be a block's
    const size_t blocks = KvLayout::blocks_for(its.window > 0 ? std::min(ring, context) : context);
    layers_.push_back({KvLayout(type, its.kv_heads, its.head_dim), its.window, blocks, 1});
    // At most 2^20 kv heads, 2^25 blocks and 2^18 bytes a block: no overflow here, but perhaps in the sum.
    Layer& layer = layers_.back();
    const size_t size = blocks * layer.layout.kv_heads * layer.layout.block_bytes();
    // A smaller layer shares its pages with its neighbours: part-filled ones would outweigh the rest.
    if (size >= 4 * kHugePage && bytes) bytes = checked_round_up(*bytes, kHugePage);
    layer.offset = bytes.value_or(0);
    if (bytes) bytes = checked_add(*bytes, size);
  }
  memory_ = allocate(bytes, "the KV cache of " + std::to_string(context) + " tokens");
  if (bytes >= 4 * kHugePage) memory_.prefer_huge_pages();
}

void BlockKvCache::begin(size_t tokens) {
  const size_t end = blocks_of(length_ + tokens);
  for (Layer& layer : layers_) {
    if (end > layer.blocks) layer.first = std::max(layer.first, (end - layer.blocks) * kBlock);
  }
}

void BlockKvCache::truncate(size_t length) {
  const bool kept = std::all_of(layers_.begin(), layers_.end(), [length](const Layer& layer) {
    return layer.first <= first_seen(length, layer.window);
  });
  length_ = kept ? length : 0;
  if (length_ > 0) return;
  for (Layer& layer : layers_) layer.first = 0;
}

template <class Piece>
void BlockKvCache::for_blocks(size_t length, Piece piece) const {
  for (const Layer& layer : layers_) {
    for (size_t block = layer.first_kept(length); block < blocks_of(length); ++block) {
      for (size_t head = 0; head < layer.layout.kv_heads; ++head) {
        piece(at(layer, head, block * kBlock), layer.layout.block_bytes());
      }
    }
  }
}

bool BlockKvCache::reaches(size_t length) const {
  return std::all_of(layers_.begin(), layers_.end(),
                     [length](const Layer& layer) { return layer.first <= layer.first_kept(length) * kBlock; });
}

size_t BlockKvCache::snapshot_bytes(size_t length) const {
  size_t bytes = 0;
  for (const Layer& layer : layers_) {
    const size_t blocks = blocks_of(length) - layer.first_kept(length);
    bytes += blocks * layer.layout.kv_heads * layer.layout.block_bytes();
  }
  return bytes;
}

std::vector<std::byte> BlockKvCache::snapshot(size_t length) const {
  std::vector<std::byte> copy(snapshot_bytes(length));
  copy_to(copy.data(), length);
  return copy;
}

void BlockKvCache::copy_to(std::byte* snapshot, size_t length) const {
  for_blocks(length,
             [&snapshot](const std::byte* block, size_t bytes) { snapshot = std::copy_n(block, bytes, snapshot); });
}

void BlockKvCache::restore(std::span<const std::byte> snapshot, size_t length) {
  const bool fits = std::all_of(layers_.begin(), layers_.end(), [length](const Layer& layer) {
    return blocks_of(length) - layer.first_kept(length) <= layer.blocks;
  });
  if (!fits || snapshot.size() != snapshot_bytes(length)) {
    throw bad_snapshot(snapshot.size(), snapshot_bytes(length), length);
  }
  const std::byte* from = snapshot.data();
  for_blocks(length, [&from](std::byte* block, size_t bytes) {
    std::copy_n(from, bytes, block);
    from += bytes;
  });
  for (Layer& layer : layers_) layer.first = layer.first_kept(length) * kBlock;
  length_ = length;
}

size_t BlockKvCache::bytes(size_t tokens) const {
  size_t bytes = 0;
  for (const Layer& layer : layers_) {
    bytes += layer.readers * layer.layout.bytes(layer.window > 0 ? std::min(tokens, layer.window) : tokens);
  }
  return bytes;
}

template <class Row>
void BlockKvCache::write_behind(size_t tokens, Row row) {
  for (const Layer& layer : layers_) {
    for (size_t position = std::max(length_, layer.first); position < length_ + tokens; ++position) {
      for (size_t head = 0; head < layer.layout.kv_heads; ++head) {
        meki::append(layer.layout, at(layer, head, position), position % kBlock, row(), row());
      }
    }
  }
}

void BlockKvCache::append_noise(size_t tokens) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> pool(8191 + KvLayout::kMaxHeadDim);
  for (float& value : pool) value = normal(random);
  const auto row = [&] { return pool.data() + random() % 8191; };
  begin(tokens);
  write_behind(tokens, row);
  length_ += tokens;
}

void BlockKvCache::clear(size_t tokens) {
  const std::vector<float> zeros(KvLayout::kMaxHeadDim);
  write_behind(tokens, [&zeros] { return zeros.data(); });
}

Tensor BlockKvCache::tensor(const std::string& name, size_t index) const {
  const Layer& layer = layers_[index_[index]];
  return {name,
          ElementType::uint8,
          {static_cast<int64_t>(layer.blocks), static_cast<int64_t>(layer.layout.kv_heads),
           static_cast<int64_t>(layer.layout.block_bytes())},
          at(layer, 0, 0)};
}

}  // namespace meki
