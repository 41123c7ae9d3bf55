#include "runtime/executor/compiled_kv_cache.h"

#include <algorithm>
#include <cstring>
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

CompiledKvCache::CompiledKvCache(const Shape& shape, const Graph* shares) : shape_(shape) {
  // Of one token and layer: at most 2^42 bytes, and below 2^31 tokens.
  const uint64_t token_bytes = uint64_t{2} * sizeof(uint16_t) * row();
  const auto bytes_of = [&](size_t tokens) {
    const auto layer_bytes = checked_mul(token_bytes, tokens);
    return layer_bytes ? checked_mul(*layer_bytes, shape.layers) : std::nullopt;
  };
  // Zeros: what lies behind the sequence is masked, but multiplied. Shared memory is for one tensor a piece.
  const auto bytes = bytes_of(shape.context);
  const std::string what = "the KV cache of " + std::to_string(shape.context) + " tokens";
  const size_t tensors = 2 * shape.layers;
  if (shares != nullptr && bytes) {
    while (shared_cache_.size() < tensors) {
      shared_cache_.push_back(shares->allocate_shared(*bytes / tensors));
      if (shared_cache_.back() != nullptr) continue;
      throw std::runtime_error(what + " needs " + std::to_string(*bytes >> 20) +
                               " MiB that the NPU shares, which the system does not give; close other sessions");
    }
  } else {
    cache_ = allocate(bytes, what);
    cache_.prefer_huge_pages();
  }
  added_ = allocate(bytes_of(shape.chunk), "a step of the model");
  const auto tensor = [&](size_t index) {
    if (!shared_cache_.empty()) return reinterpret_cast<uint16_t*>(shared_cache_[index].get());
    return cache_.as<uint16_t>() + index * row() * shape.context;
  };
  for (size_t layer = 0; layer < shape.layers; ++layer) {
    uint16_t* const added = added_.as<uint16_t>() + layer * 2 * row() * shape.chunk;
    layers_.push_back({tensor(2 * layer), tensor(2 * layer + 1), added, added + row() * shape.chunk});
  }
}

// Once in the cache, an infinity would reach every later step: masked weights are 0, and 0 times infinity is NaN.
void CompiledKvCache::check_finite(size_t tokens, const std::filesystem::path& package) const {
  const size_t wide = width(tokens);
  bool finite = true;
  for (const Layer& layer : layers_) {
    for (size_t r = 0; r < row(); ++r) finite &= is_finite(layer.new_keys + r * wide, tokens);
    for (size_t head = 0; head < shape_.kv_heads; ++head) {
      finite &= is_finite(layer.new_values + head * wide * shape_.head_dim, tokens * shape_.head_dim);
    }
  }
  if (finite) return;
  throw PackageError(package.string() +
                     ": the model computed keys or values that are not finite; its weights or memory "
                     "rows are damaged, or exceed float16: convert and compile the model again");
}

void CompiledKvCache::append(size_t tokens) {
  const size_t wide = width(tokens);
  const size_t dim = shape_.head_dim;
  for (const Layer& layer : layers_) {
    copy_rows(layer.new_keys, wide, layer.keys + length_, shape_.context, row(), tokens);
    copy_rows(layer.new_values, wide * dim, layer.values + length_ * dim, shape_.context * dim, shape_.kv_heads,
              tokens * dim);
  }
  length_ += tokens;
}

template <class Piece>
void CompiledKvCache::for_pieces(size_t first, size_t last, Piece piece) const {
  if (first == last) return;
  const size_t dim = shape_.head_dim;
  for (const Layer& layer : layers_) {
    for (size_t r = 0; r < row(); ++r) piece(layer.keys + r * shape_.context + first, last - first);
    for (size_t head = 0; head < shape_.kv_heads; ++head) {
      piece(layer.values + (head * shape_.context + first) * dim, (last - first) * dim);
    }
  }
}

std::vector<std::byte> CompiledKvCache::snapshot() const {
  std::vector<std::byte> copy;
  copy.reserve(layers_.size() * 2 * row() * length_ * sizeof(uint16_t));
  for_pieces(0, length_, [&copy](const uint16_t* data, size_t count) {
    const auto bytes = std::as_bytes(std::span(data, count));
    copy.insert(copy.end(), bytes.begin(), bytes.end());
  });
  return copy;
}

void CompiledKvCache::restore(std::span<const std::byte> snapshot, size_t length) {
  const size_t expected = layers_.size() * 2 * row() * length * sizeof(uint16_t);
  if (length > shape_.context || snapshot.size() != expected) throw bad_snapshot(snapshot.size(), expected, length);
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
  const Layer& layer = layers_[io.layer];
  const auto heads = static_cast<int64_t>(shape_.kv_heads);
  const auto dim = static_cast<int64_t>(shape_.head_dim);
  const auto tokens = static_cast<int64_t>(io.is_input ? shape_.context : width);
  const bool shared = io.is_input && !shared_cache_.empty();
  if (io.kind == IoKind::keys) {
    return {name, ElementType::float16, {heads, dim, tokens}, io.is_input ? layer.keys : layer.new_keys, shared};
  }
  return {name, ElementType::float16, {heads, tokens, dim}, io.is_input ? layer.values : layer.new_values, shared};
}

}  // namespace meki
