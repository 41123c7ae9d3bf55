#pragma once

#include <cstddef>

#include "runtime/base/parallel.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/kernels/simd/simd.h"

namespace meki {

// What one layer's attention computes on. Passive data.
struct AttentionArgs {
  size_t heads = 0;                      // query heads, a multiple of the layout's kv_heads
  size_t tokens = 0;                     // to compute
  size_t past = 0;                       // tokens in the cache before them
  const float* qkv = nullptr;            // [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys, values
  const float* cos = nullptr;            // [at least past + tokens, head_dim / 2]
  const float* sin = nullptr;            // as cos
  const float* q_norm_weight = nullptr;  // [head_dim] of the RMSNorm over every query head; null: none
  const float* k_norm_weight = nullptr;  // as q_norm_weight, of keys
  float epsilon = 1e-6F;                 // of these norms
  std::byte* cache = nullptr;            // the layer's, layout.bytes(past + tokens) or more
  float* out = nullptr;                  // [tokens, heads * head_dim]
};

// Normalises and rotates queries and keys (RoPE by half rotation: element i with i + head_dim / 2), appends keys and
// values to the cache, and lets each query attend to everything up to its own position:
//
//   out = softmax(q K^T / sqrt(head_dim)) V
//
// by the online softmax (Milakov and Gimelshein, arXiv 1805.02867), split over the sequence where there are too few
// heads and tokens to occupy many threads evenly (Flash-Decoding). How it is split, and so the result, depends on the
// shapes alone, not on the number of threads. A key or value is read once for all query heads of its group. Queries and
// keys of an int4 cache are rotated by an orthonormal Hadamard matrix over the largest power of two that divides
// head_dim, which leaves their products as they are. Thread-safe on distinct caches. Throws std::bad_alloc.
void attention(const Simd& simd, const KvLayout& layout, const AttentionArgs& args, const Parallel& parallel);

}  // namespace meki
