#include <algorithm>

#include "runtime/kernels/attention.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;

}  // namespace

KeyOffsets::KeyOffsets(const float* values, const KvLayout& layout, const float* cos, const float* sin,
                       size_t positions)
    : half_(layout.head_dim / 2), cos_(cos), sin_(sin), of_head_(layout.kv_heads), turns_(half_ * 2 * kBlock) {
  for (size_t head = 0; head < layout.kv_heads; ++head) {
    const float* const offset = values + head * layout.head_dim;
    for (size_t i = 0; i < half_; ++i) {
      if (offset[i] != 0 || offset[half_ + i] != 0) of_head_[head].push_back({i, offset[i], offset[half_ + i]});
    }
    pairs_ = std::max(pairs_, of_head_[head].size());
  }
  for (size_t p = 0; p < std::min(kBlock, positions); ++p) {
    for (size_t i = 0; i < half_; ++i) {
      turns_[2 * i * kBlock + p] = cos[p * half_ + i];
      turns_[(2 * i + 1) * kBlock + p] = sin[p * half_ + i];
    }
  }
}

void KeyOffsets::subtract(size_t kv_head, float* key) const {
  for (const auto& [i, low, high] : of_head_[kv_head]) {
    key[i] -= low;
    key[half_ + i] -= high;
  }
}

void KeyOffsets::prepare(size_t kv_head, const float* query, float* out) const {
  for (const auto& [i, low, high] : of_head_[kv_head]) {
    *out++ = query[i] * low + query[half_ + i] * high;
    *out++ = query[half_ + i] * low - query[i] * high;
  }
}

// The angle of position p + j is that of p and that of j.
void KeyOffsets::add(size_t kv_head, const float* prepared, size_t position, float* scores) const {
  const float* const cos = cos_ + position * half_;
  const float* const sin = sin_ + position * half_;
  for (const Pair& pair : of_head_[kv_head]) {
    const float a = *prepared++;
    const float b = *prepared++;
    const float by_cos = a * cos[pair.index] + b * sin[pair.index];
    const float by_sin = b * cos[pair.index] - a * sin[pair.index];
    const float* const turns = turns_.data() + 2 * pair.index * kBlock;
    for (size_t j = 0; j < kBlock; ++j) scores[j] += by_cos * turns[j] + by_sin * turns[kBlock + j];
  }
}

}  // namespace meki
