#pragma once

#include <cstddef>
#include <string_view>

namespace meki {

// How keys and values are stored. float32 is exact; int8 has one float32 scale a token and head, the largest magnitude
// divided by 127; int4 one float16 scale for every 32 elements of a token and head: for values the largest magnitude
// divided by 7, for keys the element of largest magnitude divided by -8. Who stores integer keys rotates them first
// (attention.h): spreading outlier channels halves what 4 bits lose, and 8 bits lose a third to an eighth.
enum class KvType { float32, float16, int8, int4 };

std::string_view name_of(KvType type);
// Throws std::invalid_argument.
KvType parse_kv_type(std::string_view name);

// Where things are in one layer's cache. The cache is a sequence of blocks [position / 512, kv_heads, 8]: a block has
// one head's keys and values of 64 consecutive positions, and 8 of them are a run of neighbours, because hardware
// fetches ahead what is read in a row. In the order that the kernels stream them, a block has
//
//   float32, float16   keys [head_dim][64], values [64][head_dim]
//   int8               key scales float [64], keys [head_dim / 4][64][4],
//                      value scales float [64], values [16][head_dim][4]: 4 positions of one element are neighbours
//   int4               key scales half [head_dim / 32][64], keys [head_dim / 32][4][64][4]: byte (g, i, p, b) has
//                      element 32g + 4i + b of position p in its low nibble, 32g + 16 + 4i + b in its high one;
//                      value scales half [head_dim / 32][64], values [8][head_dim][4]: byte (i, e, b) has
//                      position 4i + b in its low nibble, 32 + 4i + b in its high one; a nibble is the code + 8
//
// Integer products then need no shuffles: one 32-bit lane takes 4 neighbouring bytes. Passive data.
struct KvLayout {
  static constexpr size_t kBlock = 64;  // positions of a block
  static constexpr size_t kRun = 8;     // blocks of one head that are neighbours
  static constexpr size_t kGroup = 32;  // elements that share a scale, int4
  static constexpr size_t kMaxHeadDim = 512;

  // Throws std::invalid_argument if head_dim is not a multiple of 16 (32 for int4) up to kMaxHeadDim.
  KvLayout(KvType type, size_t kv_heads, size_t head_dim);

  KvType type;
  size_t kv_heads;
  size_t head_dim;
  size_t scale_bytes;  // of one block's keys; its values have as many
  size_t code_bytes;   // of one block's keys; its values have as many

  size_t block_bytes() const { return 2 * (scale_bytes + code_bytes); }
  size_t values_offset() const { return scale_bytes + code_bytes; }
  // Of the blocks of one layer that `tokens` tokens fill.
  size_t bytes(size_t tokens) const { return (tokens + kBlock - 1) / kBlock * kv_heads * block_bytes(); }
  // How many blocks a head has in a layer with room for `tokens` tokens: whole runs.
  static constexpr size_t blocks_for(size_t tokens) { return (tokens + kRun * kBlock - 1) / (kRun * kBlock) * kRun; }
  // The block of a kv head that has position `position`, from a layer's cache.
  size_t block_offset(size_t kv_head, size_t position) const {
    const size_t block = position / kBlock;
    return ((block / kRun * kv_heads + kv_head) * kRun + block % kRun) * block_bytes();
  }
};

// The first position that the token at `position` sees. window: how many it sees, itself included; 0: all.
constexpr size_t first_seen(size_t position, size_t window) {
  return window == 0 || position < window ? 0 : position + 1 - window;
}

// Stores one head's key and value (each float32 [head_dim]) as position `slot` (0 to 63) of `block`.
void append(const KvLayout& layout, std::byte* block, size_t slot, const float* key, const float* value);

}  // namespace meki
