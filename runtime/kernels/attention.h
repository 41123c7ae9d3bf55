#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "runtime/base/parallel.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/kernels/simd/simd.h"

namespace meki {

// What all keys of a layer have in common before they are rotated, in a few channels: the large ones of their bias. It
// is not stored with each key, where it would make the steps of an integer cache coarse for all other channels, but
// added to the scores. With q and b the elements i and i + head_dim / 2 of a rotated query and of the offset, position
// p and the angle a_i of one position, RoPE makes of it
//
//   q . R(p) b = cos(p a_i) (q0 b0 + q1 b1) + sin(p a_i) (q1 b0 - q0 b1)
//
// and p a_i is the angle of a block's first position plus that of 0 to 63, which the rotary tables' first lines have.
// Immutable.
class KeyOffsets {
 public:
  // values: [kv_heads, head_dim]; cos and sin: the rotary tables, float32 [positions, head_dim / 2], which outlive it.
  KeyOffsets(const float* values, const KvLayout& layout, const float* cos, const float* sin, size_t positions);

  // The most pairs of a kv head that have an offset.
  size_t pairs() const { return pairs_; }
  void subtract(size_t kv_head, float* key) const;
  // What `add` needs of a rotated query [head_dim]: [pairs(), 2].
  void prepare(size_t kv_head, const float* query, float* out) const;
  // Adds to a query's scores of the 64 positions from `position` on.
  void add(size_t kv_head, const float* prepared, size_t position, float* scores) const;

 private:
  struct Pair {
    size_t index;  // i
    float low;     // b0
    float high;    // b1
  };
  const size_t half_;
  const float* const cos_;
  const float* const sin_;
  size_t pairs_ = 0;
  std::vector<std::vector<Pair>> of_head_;
  std::vector<float> turns_;  // [head_dim / 2, 2, 64]: cos and sin of the first positions, by channel
};

// What one layer's attention computes on, of one sequence. Passive data.
struct AttentionArgs {
  size_t heads = 0;            // query heads, a multiple of the layout's kv_heads
  size_t tokens = 0;           // to compute
  size_t past = 0;             // tokens before them
  bool shared = false;         // the cache is another layer's, which has added the step's keys and values already
  const float* qkv = nullptr;  // [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys, values; shared: queries
  const float* cos = nullptr;  // [tokens, head_dim / 2]
  const float* sin = nullptr;  // as cos
  const float* q_norm_weight = nullptr;  // [head_dim] of the RMSNorm over every query head; null: none
  const float* k_norm_weight = nullptr;  // as q_norm_weight, of keys
  bool value_norm = false;               // values are divided by their RMS over head_dim
  float epsilon = 1e-6F;                 // of these norms
  float scale = 1;                       // of the products of queries and keys
  const KeyOffsets* offsets = nullptr;   // of the keys; null: none
  size_t window = 0;                     // positions that a token sees, itself included; 0: all
  std::byte* cache = nullptr;            // the layer's
  size_t cache_blocks = 0;  // that it has for each head, whole runs; position p is in block p / 64 modulo so many. All
                            // that the tokens see has to be in it at once, with a window `window + tokens` positions
  float* out = nullptr;     // [tokens, heads * head_dim]
};

// Normalises and rotates queries and keys (RoPE by half rotation: element i with i + head_dim / 2), appends keys and
// values to the cache, and lets each query attend to its own position and what it sees before that:
//
//   out = softmax(scale * q K^T) V
//
// by the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over ranges of the sequence, whose results are
// joined in their order. Where the tokens are too few to occupy many threads, the ranges are pieces of work
// (Flash-Decoding). They depend on positions alone: a token's result is the same to the bit whatever tokens are
// computed beside it and by however many threads. A key or value is read once for all query heads of its group. Queries
// and keys of an integer cache are rotated by an orthonormal Hadamard matrix over the largest power of two that divides
// head_dim, which leaves their products as they are and spreads outliers before they are rounded. Of several sequences,
// each with a cache of its own, the pieces of all are shared out together; the results are those of each alone.
// Thread-safe on distinct caches. Throws std::bad_alloc.
void attention(const Simd& simd, const KvLayout& layout, std::span<const AttentionArgs> sequences,
               const Parallel& parallel);
// Of one sequence.
inline void attention(const Simd& simd, const KvLayout& layout, const AttentionArgs& args, const Parallel& parallel) {
  attention(simd, layout, std::span(&args, 1), parallel);
}

}  // namespace meki
