#include "runtime/kernels/kv_cache.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "runtime/base/half.h"
#include "runtime/kernels/rounding.h"
#include "runtime/kernels/simd/simd.h"

namespace meki {
namespace {

constexpr std::array<std::string_view, 4> kNames = {"float32", "float16", "int8", "int4"};
constexpr std::array<size_t, 4> kBits = {32, 16, 8, 4};  // of an element
constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kGroup = KvLayout::kGroup;

size_t scale_bytes_of(KvType type, size_t head_dim) {
  switch (type) {
    case KvType::int8: return kBlock * sizeof(float);
    case KvType::int4: return head_dim / kGroup * kBlock * sizeof(uint16_t);
    default: return 0;
  }
}

template <class T, class Convert>
void append_floats(size_t head_dim, std::byte* keys, std::byte* values, size_t slot, const float* key,
                   const float* value, Convert convert) {
  T* const k = reinterpret_cast<T*>(keys);
  T* const v = reinterpret_cast<T*>(values) + slot * head_dim;
  for (size_t e = 0; e < head_dim; ++e) k[e * kBlock + slot] = convert(key[e]);
  for (size_t e = 0; e < head_dim; ++e) v[e] = convert(value[e]);
}

void append_int8(const KvLayout& layout, std::byte* block, size_t slot, const float* key, const float* value) {
  const size_t head_dim = layout.head_dim;
  int8_t codes[KvLayout::kMaxHeadDim];
  const auto round = [&](std::byte* scales, const float* from) {  // returns where the codes are to go
    reinterpret_cast<float*>(scales)[slot] = simd().quantize_head(from, head_dim, codes, nullptr);
    return reinterpret_cast<int8_t*>(scales + layout.scale_bytes);
  };
  int8_t* const keys = round(block, key) + slot * 4;
  for (size_t e = 0; e < head_dim; e += 4) std::memcpy(keys + e * kBlock, codes + e, 4);
  int8_t* const values = round(block + layout.values_offset(), value) + slot / 4 * 4 * head_dim + slot % 4;
  for (size_t e = 0; e < head_dim; ++e) values[e * 4] = codes[e];
}

void set_nibble(uint8_t& byte, bool high, int code) {
  const auto nibble = static_cast<unsigned>(code + 8);
  byte = static_cast<uint8_t>(high ? (byte & 0x0FU) | nibble << 4 : (byte & 0xF0U) | nibble);
}

// The scale that maps the element of largest magnitude to -8: the level that 7 has no counterpart of.
float signed_scale(const float* group) {
  float extreme = 0;
  for (size_t i = 0; i < kGroup; ++i) extreme = std::fabs(group[i]) > std::fabs(extreme) ? group[i] : extreme;
  return largest_magnitude(group, kGroup) * (extreme > 0 ? -0.125F : 0.125F);  // of the magnitude: NaN stays
}

void append_int4(const KvLayout& layout, std::byte* block, size_t slot, const float* key, const float* value) {
  const size_t head_dim = layout.head_dim;
  const auto store = [&](std::byte* scales, const float* from, auto scale_of, auto place) {
    auto* const codes = reinterpret_cast<uint8_t*>(scales + layout.scale_bytes);
    for (size_t g = 0; g < head_dim / kGroup; ++g) {
      const float* const group = from + g * kGroup;
      const uint16_t stored = float_to_half(scale_of(group));
      reinterpret_cast<uint16_t*>(scales)[g * kBlock + slot] = stored;
      const float scale = half_to_float(stored);
      const float inverse = scale != 0 ? 1 / scale : 0;
      for (size_t i = 0; i < kGroup; ++i) {
        const auto [index, high] = place(g, i);
        set_nibble(codes[index], high, std::clamp(round_to_int(group[i] * inverse), -8, 7));
      }
    }
  };
  struct Place {
    size_t index;
    bool high;
  };
  store(block, key, signed_scale,
        [slot](size_t g, size_t i) { return Place{(g * 4 + i % 16 / 4) * 4 * kBlock + slot * 4 + i % 4, i >= 16}; });
  store(
      block + layout.values_offset(), value, [](const float* group) { return largest_magnitude(group, kGroup) / 7; },
      [slot, head_dim](size_t g, size_t i) {
        return Place{slot % 32 / 4 * 4 * head_dim + (g * kGroup + i) * 4 + slot % 4, slot >= 32};
      });
}

}  // namespace

std::string_view name_of(KvType type) { return kNames.at(static_cast<size_t>(type)); }

KvType parse_kv_type(std::string_view name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) {
    throw std::invalid_argument("kv type is \"" + std::string(name) + "\", expected float32, float16, int8 or int4");
  }
  return static_cast<KvType>(found - kNames.begin());
}

KvLayout::KvLayout(KvType type_, size_t kv_heads_, size_t head_dim_)
    : type(type_),
      kv_heads(kv_heads_),
      head_dim(head_dim_),
      scale_bytes(scale_bytes_of(type_, head_dim_)),
      code_bytes(kBlock * head_dim_ * kBits.at(static_cast<size_t>(type_)) / 8) {
  const size_t unit = type == KvType::int4 ? kGroup : 16;
  if (head_dim == 0 || head_dim % unit != 0 || head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim is " + std::to_string(head_dim) + ", a KV cache of type " +
                                std::string(name_of(type)) + " needs a multiple of " + std::to_string(unit) +
                                " up to " + std::to_string(kMaxHeadDim) +
                                (type == KvType::int4 ? "; choose another kv type" : ""));
  }
}

void append(const KvLayout& layout, std::byte* block, size_t slot, const float* key, const float* value) {
  std::byte* const values = block + layout.values_offset();
  switch (layout.type) {
    case KvType::float32:
      return append_floats<float>(layout.head_dim, block, values, slot, key, value, [](float x) { return x; });
    case KvType::float16:
      return append_floats<uint16_t>(layout.head_dim, block, values, slot, key, value, float_to_half);
    case KvType::int8: return append_int8(layout, block, slot, key, value);
    case KvType::int4: return append_int4(layout, block, slot, key, value);
  }
}

}  // namespace meki
