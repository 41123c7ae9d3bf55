#include "runtime/executor/dynamic_state.h"

#include <algorithm>
#include <utility>

#include "runtime/base/checked.h"
#include "runtime/executor/stages.h"

namespace meki {

ConvolutionCache::ConvolutionCache(size_t layers, size_t token_bytes, size_t context)
    : layers_(layers), token_bytes_(token_bytes), context_(context) {
  if (layers == 0) return;
  auto bytes = checked_mul(token_bytes, context);
  if (bytes) bytes = checked_mul(*bytes, layers);
  memory_ = allocate(bytes, "the convolutions' cache of " + std::to_string(context) + " tokens");
}

void ConvolutionCache::copy_to(std::byte* snapshot, size_t tokens) const {
  const size_t used = token_bytes_ * tokens;
  for (size_t index = 0; index < layers_; ++index) std::copy_n(layer(index), used, snapshot + index * used);
}

void ConvolutionCache::copy_from(const std::byte* snapshot, size_t tokens) {
  const size_t used = token_bytes_ * tokens;
  for (size_t index = 0; index < layers_; ++index) std::copy_n(snapshot + index * used, used, layer(index));
}

Tensor ConvolutionCache::tensor(const std::string& name, size_t index) const {
  return {name, ElementType::uint8, {static_cast<int64_t>(context_), static_cast<int64_t>(token_bytes_)}, layer(index)};
}

DynamicState::DynamicState(BlockKvCache kv_cache, ConvolutionCache convolutions)
    : kv_cache_(std::move(kv_cache)), convolutions_(std::move(convolutions)) {}

void DynamicState::append(size_t tokens) {
  kv_cache_.append(tokens);
  length_ = kv_cache_.length();
}

void DynamicState::truncate(size_t length) {
  kv_cache_.truncate(length);
  length_ = kv_cache_.length();
}

size_t DynamicState::snapshot_bytes(size_t length) const {
  return kv_cache_.snapshot_bytes(length) + convolutions_.bytes(length);
}

std::vector<std::byte> DynamicState::snapshot(size_t length) const {
  std::vector<std::byte> copy(snapshot_bytes(length));
  kv_cache_.copy_to(copy.data(), length);
  convolutions_.copy_to(copy.data() + kv_cache_.snapshot_bytes(length), length);
  return copy;
}

void DynamicState::restore(std::span<const std::byte> snapshot, size_t length) {
  const size_t expected = snapshot_bytes(length);
  if (length > convolutions_.context() || snapshot.size() != expected) {
    throw bad_snapshot(snapshot.size(), expected, length);
  }
  const auto keys_and_values = snapshot.first(kv_cache_.snapshot_bytes(length));
  kv_cache_.restore(keys_and_values, length);
  convolutions_.copy_from(snapshot.data() + keys_and_values.size(), length);
  length_ = length;
}

void DynamicState::append_noise(size_t tokens) {
  kv_cache_.append_noise(tokens);
  length_ = kv_cache_.length();
}

}  // namespace meki
