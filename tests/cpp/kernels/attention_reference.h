#pragma once

// What the tests of attention share: a sequence with its cache, and a comparison with a naive attention in double
// precision.

#include <cmath>
#include <optional>
#include <vector>

#include "runtime/kernels/attention.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki::test {

struct Shape {
  size_t kv_heads;
  size_t group;  // query heads of a kv head
  size_t head_dim;
  size_t past;
  size_t tokens;
  bool norm = false;
  bool offsets = false;  // of the keys
  size_t window = 0;
  bool value_norm = false;
  float scale = 0;  // 0: 1 / sqrt(head_dim)

  size_t heads() const { return kv_heads * group; }
  size_t width() const { return (heads() + 2 * kv_heads) * head_dim; }
  size_t total() const { return past + tokens; }
  float factor() const { return scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(head_dim)); }
};

// A sequence, and the cache that a session would keep for it.
class Sequence {
 public:
  Sequence(const Shape& shape, KvType type, Random& random);

  // Runs tokens first .. last - 1 in steps of at most `chunk`; returns float32 [last - first, heads * head_dim].
  std::vector<float> run(const Simd& path, size_t first, size_t last, size_t chunk, const Parallel& parallel);
  AttentionArgs args(size_t past, size_t tokens, float* out);

  Shape shape;
  KvLayout layout;
  std::vector<float> qkv;  // [total, width]
  std::vector<float> q_norm_weight;
  std::vector<float> k_norm_weight;
  std::vector<float> offsets;  // [kv_heads, head_dim]
  std::optional<KeyOffsets> kept_apart;
  std::vector<float> cos;  // [total, head_dim / 2]
  std::vector<float> sin;
  Bytes cache;

 private:
  void add_offsets(Random& random);
};

// All paths, with one and four threads, in one step and token by token, against the naive attention.
void check(const Shape& shape, KvType type, Random& random);

}  // namespace meki::test
