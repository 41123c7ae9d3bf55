#pragma once

#include <cstddef>
#include <cstdint>

namespace meki {

// How the values of a weight matrix are stored, by the numbers that graphs name them with (docs/package-format.md,
// "Packed matrices"). All but float32 are packed in blocks of 32 inputs: value = scale * code, plus a minimum for two
// of them; int8_16 has a scale for every 16 inputs.
enum class WeightType : uint8_t { float32, int8, int4, int4_minimum, int8_minimum, int8_16 };
inline constexpr size_t kWeightTypes = 6;

constexpr int weight_bits(WeightType type) {
  return type == WeightType::int4 || type == WeightType::int4_minimum ? 4 : 8;
}
constexpr bool has_minimum(WeightType type) {
  return type == WeightType::int4_minimum || type == WeightType::int8_minimum;
}
// Scales of a row of a block.
constexpr int weight_groups(WeightType type) { return type == WeightType::int8_16 ? 2 : 1; }
// What a code of 0 is stored as: codes are unsigned.
constexpr int code_offset(WeightType type) {
  return type == WeightType::int4_minimum ? 0 : weight_bits(type) == 4 ? 8 : 128;
}
// Of the codes of a block of 16 rows; scales follow, then minimums.
constexpr size_t code_bytes(WeightType type) { return 64 * static_cast<size_t>(weight_bits(type)); }
constexpr size_t block_bytes(WeightType type) {
  return code_bytes(type) + 32 * static_cast<size_t>(weight_groups(type) + (has_minimum(type) ? 1 : 0));
}

}  // namespace meki
