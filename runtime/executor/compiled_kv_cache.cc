#include "runtime/executor/compiled_kv_cache.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <stdexcept>

#include "runtime/base/checked.h"
#include "runtime/base/error.h"
#include "runtime/base/half.h"

namespace meki {
namespace {

bool is_finite(const uint16_t* halves, size_t count) {
  constexpr uint16_t kExponent = 0x7C00;  // all ones: infinity or NaN
  bool finite = true;
  for (size_t i = 0; i < count; ++i) finite &= (halves[i] & kExponent) != kExponent;
  return finite;
}

// Copies `count` values of each row of `from` (`from_stride` values apart) to `to`.
void copy_rows(const uint16_t* from, size_t from_stride, uint16_t* to, size_t to_stride, size_t rows, size_t count) {
  for (size_t row = 0; row < rows; ++row) std::copy_n(from + row * from_stride, count, to + row * to_stride);
}

}  // namespace

CompiledKvCache::CompiledKvCache(const Shape& shape, const Graph* shares)
    : context_(shape.context), chunk_(shape.chunk) {
  // Of one token and layer: at most 2^42 bytes, and below 2^31 tokens.
  const auto bytes_of = [](const KvCacheInfo& its, size_t tokens) {
    return checked_mul(uint64_t{2} * sizeof(uint16_t) * its.kv_heads * its.head_dim, tokens);
  };
  std::optional<uint64_t> bytes = 0;
  std::optional<uint64_t> added_bytes = 0;
  for (const KvCacheInfo& its : shape.caches) {
    const auto cache = bytes_of(its, context_);
    readers_bytes_ += cache.value_or(0);
    if (its.shared) {
      index_.push_back(index_[*its.shared]);
      continue;
    }
    index_.push_back(layers_.size());
    layers_.push_back({.kv_heads = its.kv_heads, .head_dim = its.head_dim});
    const auto added = bytes_of(its, chunk_);
    bytes = bytes && cache ? checked_add(*bytes, *cache) : std::nullopt;
    added_bytes = added_bytes && added ? checked_add(*added_bytes, *added) : std::nullopt;
  }
  // Zeros: what lies behind the sequence is masked, but multiplied. Shared memory is for one tensor a piece.
  const std::string what = "the KV cache of " + std::to_string(context_) + " tokens";
  if (shares != nullptr && bytes) {
    for (const Layer& layer : layers_) {
      for (size_t tensor = 0; tensor < 2; ++tensor) {
        shared_cache_.push_back(shares->allocate_shared(layer.row() * context_ * sizeof(uint16_t)));
        if (shared_cache_.back() != nullptr) continue;
        throw std::runtime_error(what + " needs " + std::to_string(*bytes >> 20) +
                                 " MiB that the NPU shares, which the system does not give; close other sessions");
      }
    }
  } else {
    cache_ = allocate(bytes, what);
    cache_.prefer_huge_pages();
  }
  added_ = allocate(added_bytes, "a step of the model");
  size_t before = 0;  // elements of a token in the layers before
  for (size_t index = 0; index < layers_.size(); ++index) {
    Layer& layer = layers_[index];
    const auto tensor = [&](size_t number) {
      if (!shared_cache_.empty()) return reinterpret_cast<uint16_t*>(shared_cache_[2 * index + number].get());
      return cache_.as<uint16_t>() + (before + number * layer.row()) * context_;
    };
    layer.keys = tensor(0);
    layer.values = tensor(1);
    layer.new_keys = added_.as<uint16_t>() + before * chunk_;
    layer.new_values = layer.new_keys + layer.row() * chunk_;
    before += 2 * layer.row();
  }
}

// Once in the cache, an infinity would reach every later step: masked weights are 0, and 0 times infinity is NaN.
void CompiledKvCache::check_finite(size_t tokens, const std::filesystem::path& package) const {
  const size_t wide = width(tokens);
  bool finite = true;
  for (const Layer& layer : layers_) {
    for (size_t r = 0; r < layer.row(); ++r) finite &= is_finite(layer.new_keys + r * wide, tokens);
    for (size_t head = 0; head < layer.kv_heads; ++head) {
      finite &= is_finite(layer.new_values + head * wide * layer.head_dim, tokens * layer.head_dim);
    }
  }
  if (finite) return;
  throw PackageError(package.string() +
                     ": the model computed keys or values that are not finite; its weights or memory "
                     "rows are damaged, or exceed float16: convert and compile the model again");
}

void CompiledKvCache::append(size_t tokens) {
  const size_t wide = width(tokens);
  for (const Layer& layer : layers_) {
    const size_t dim = layer.head_dim;
    copy_rows(layer.new_keys, wide, layer.keys + length_, context_, layer.row(), tokens);
    copy_rows(layer.new_values, wide * dim, layer.values + length_ * dim, context_ * dim, layer.kv_heads, tokens * dim);
  }
  length_ += tokens;
}

template <class Piece>
void CompiledKvCache::for_pieces(size_t first, size_t last, Piece piece) const {
  if (first == last) return;
  for (const Layer& layer : layers_) {
    const size_t dim = layer.head_dim;
    for (size_t r = 0; r < layer.row(); ++r) piece(layer.keys + r * context_ + first, last - first);
    for (size_t head = 0; head < layer.kv_heads; ++head) {
      piece(layer.values + (head * context_ + first) * dim, (last - first) * dim);
    }
  }
}

size_t CompiledKvCache::token_elements() const {
  size_t elements = 0;
  for (const Layer& layer : layers_) elements += layer.row();
  return elements;
}

std::vector<std::byte> CompiledKvCache::snapshot(size_t length) const {
  std::vector<std::byte> copy;
  copy.reserve(snapshot_bytes(length));
  for_pieces(0, length, [&copy](const uint16_t* data, size_t count) {
    const auto bytes = std::as_bytes(std::span(data, count));
    copy.insert(copy.end(), bytes.begin(), bytes.end());
  });
  return copy;
}

void CompiledKvCache::restore(std::span<const std::byte> snapshot, size_t length) {
  const size_t expected = snapshot_bytes(length);
  if (length > context_ || snapshot.size() != expected) throw bad_snapshot(snapshot.size(), expected, length);
  size_t done = 0;
  for_pieces(0, length, [&](uint16_t* data, size_t count) {
    std::memcpy(data, snapshot.data() + done, count * sizeof(uint16_t));
    done += count * sizeof(uint16_t);
  });
  length_ = length;
}

void CompiledKvCache::append_noise(size_t tokens) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> pool(65'536);
  for (uint16_t& value : pool) value = float_to_half(normal(random));
  const size_t half = pool.size() / 2;  // what a piece is at most: it begins anywhere in the first half
  for_pieces(length_, length_ + tokens, [&](uint16_t* data, size_t count) {
    for (size_t done = 0; done < count; done += half) {
      std::copy_n(pool.data() + random() % half, std::min(count - done, half), data + done);
    }
  });
  length_ += tokens;
}

Tensor CompiledKvCache::tensor(const std::string& name, const Io& io, size_t width) const {
  const Layer& layer = layers_[index_[io.layer]];
  const auto heads = static_cast<int64_t>(layer.kv_heads);
  const auto dim = static_cast<int64_t>(layer.head_dim);
  const bool is_new = !io.is_input || io.kind == IoKind::seen_new_keys || io.kind == IoKind::seen_new_values;
  const auto tokens = static_cast<int64_t>(is_new ? width : context_);
  const bool shared = !is_new && !shared_cache_.empty();
  if (io.kind == IoKind::keys || io.kind == IoKind::seen_keys || io.kind == IoKind::seen_new_keys) {
    return {name, ElementType::float16, {heads, dim, tokens}, is_new ? layer.new_keys : layer.keys, shared};
  }
  return {name, ElementType::float16, {heads, tokens, dim}, is_new ? layer.new_values : layer.values, shared};
}

}  // namespace meki
