#include "runtime/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "runtime/kernels/norm.h"
#include "runtime/kernels/scratch.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kTileRows = 32;  // queries of one pass over the cache: what keeps a block of it in the nearest caches
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

// The ranges of blocks that a sequence is cut into, whatever its length: of `step` blocks each, without a window twice
// as long after every 8, so that a long sequence has few of them and each of these is a small part of it.
class Ranges {
 public:
  Ranges(size_t step, size_t window) : step_(step), grow_(window == 0) {}

  // The range that has `block`.
  size_t index(size_t block) const {
    if (!grow_) return block / step_;
    size_t doubled = 0;
    while (block >= start(8 * (doubled + 1))) ++doubled;
    return 8 * doubled + (block - start(8 * doubled)) / (step_ << doubled);
  }
  // Its first block.
  size_t start(size_t index) const {
    if (!grow_) return index * step_;
    const size_t doubled = index / 8;
    return (8 * ((size_t{1} << doubled) - 1) + (index % 8 << doubled)) * step_;
  }

 private:
  size_t step_;
  bool grow_;
};

// How the work is cut into pieces. A row is one query head of one token; the rows of a kv head are ordered by token,
// then head. A tile of rows goes through the ranges of blocks that it sees: in one piece, or in a piece for each range.
struct Partition {
  size_t group;  // query heads of a kv head
  size_t rows;   // of one kv head
  size_t tile_rows;
  size_t tiles;  // of one kv head
  Ranges ranges;
  size_t first_range;  // that is seen
  size_t range_count;
  bool split;  // each range is a piece
  bool integer;

  Partition(const KvLayout& layout, const AttentionArgs& args)
      : group(args.heads / layout.kv_heads),
        rows(args.tokens * group),
        tile_rows(std::min(rows, kTileRows)),
        tiles(divide_up(rows, tile_rows)),
        // With few heads there are more ranges, for as many pieces.
        ranges(std::clamp<size_t>(layout.kv_heads, 2, KvLayout::kRun), args.window),
        first_range(ranges.index(first_seen(args.past, args.window) / kBlock)),
        range_count(ranges.index((args.past + args.tokens - 1) / kBlock) + 1 - first_range),
        split(range_count > 1 && tiles * layout.kv_heads < kPieces),  // else it would only take memory
        integer(layout.type == KvType::int8 || layout.type == KvType::int4) {}

  static constexpr size_t kPieces = 16;  // of tiles, that occupy the threads without being split
};

// The online softmax of `rows` rows over a part of the sequence. Passive data.
struct Sums {
  float* maxima;   // [rows]
  float* sums;     // [rows]
  float* outputs;  // [rows, head_dim]

  void clear(size_t rows, size_t head_dim) const {
    std::fill_n(maxima, rows, kMinusInfinity);
    std::fill_n(sums, rows, 0.0F);
    std::fill_n(outputs, rows * head_dim, 0.0F);
  }
  Sums from(size_t row, size_t head_dim) const { return {maxima + row, sums + row, outputs + row * head_dim}; }

  // Adds what the next part of the sequence has for each row.
  void add(const Sums& next, size_t rows, size_t head_dim) const {
    for (size_t row = 0; row < rows; ++row) {
      const float largest = std::max(maxima[row], next.maxima[row]);
      // A part in which nothing is seen has weight 0; if its sum is NaN, that stays.
      const auto weight = [largest](float maximum) {
        return maximum == kMinusInfinity ? 0 : std::exp(maximum - largest);
      };
      const float kept = weight(maxima[row]);
      const float added = weight(next.maxima[row]);
      maxima[row] = largest;
      sums[row] = kept * sums[row] + added * next.sums[row];
      float* const output = outputs + row * head_dim;
      const float* const others = next.outputs + row * head_dim;
      for (size_t e = 0; e < head_dim; ++e) output[e] = kept * output[e] + added * others[e];
    }
  }
};

// The queries of all kv heads, as struct Queries has them.
struct Prepared {
  float* values;
  int8_t* codes;
  float* scales;
  int32_t* sums;
  float* offsets;  // [kv_heads, rows, 2 * KeyOffsets::pairs()], of KeyOffsets::prepare
};

// The attention of one sequence.
class Attention {
 public:
  Attention(const Simd& simd, const KvLayout& layout, const AttentionArgs& args)
      : simd_(simd), layout_(layout), args_(args), partition_(layout, args) {}

  // What take() takes.
  size_t scratch_bytes() const {
    const Sizes size = sizes();
    return Scratch::bytes<float>(size.values) + Scratch::bytes<int8_t>(size.codes) + Scratch::bytes<float>(size.rows) +
           Scratch::bytes<int32_t>(size.sums) + Scratch::bytes<float>(size.offsets) +
           2 * Scratch::bytes<float>(size.partials) + Scratch::bytes<float>(size.partials * layout_.head_dim);
  }
  void take(Scratch& scratch) {
    const Sizes size = sizes();
    queries_ = {scratch.take<float>(size.values), scratch.take<int8_t>(size.codes), scratch.take<float>(size.rows),
                scratch.take<int32_t>(size.sums), scratch.take<float>(size.offsets)};
    partial_ = {scratch.take<float>(size.partials), scratch.take<float>(size.partials),
                scratch.take<float>(size.partials * layout_.head_dim)};
  }

  size_t pieces() const {
    return layout_.kv_heads * partition_.tiles * (partition_.split ? partition_.range_count : 1);
  }
  bool split() const { return partition_.split; }
  // Bytes of the cache that all tokens together look at.
  size_t work() const {
    const size_t seen = args_.past + args_.tokens - first_seen(args_.past, args_.window);
    return layout_.bytes(seen) * args_.tokens;
  }

  // Appends one kv head's keys and values, and prepares the queries of its group.
  void prepare(size_t kv_head) const {
    const size_t dim = layout_.head_dim;
    const size_t width = (args_.heads + (args_.shared ? 0 : 2 * layout_.kv_heads)) * dim;
    for (size_t t = 0; t < args_.tokens; ++t) {
      const float* const cos = args_.cos + t * (dim / 2);
      const float* const sin = args_.sin + t * (dim / 2);
      if (!args_.shared) {
        const float* const key = args_.qkv + t * width + (args_.heads + kv_head) * dim;
        store(kv_head, args_.past + t, key, key + layout_.kv_heads * dim, cos, sin);
      }
      for (size_t g = 0; g < partition_.group; ++g) {
        const size_t row = kv_head * partition_.rows + t * partition_.group + g;
        float* const query = queries_.values + row * dim;
        const float* const given = args_.qkv + t * width + (kv_head * partition_.group + g) * dim;
        rotate(given, args_.q_norm_weight, cos, sin, args_.scale, query);
        if (args_.offsets != nullptr) args_.offsets->prepare(kv_head, query, queries_.offsets + row * 2 * pairs());
        if (!partition_.integer) continue;
        simd_.hadamard(query, dim);
        queries_.scales[row] =
            simd_.quantize_head(query, dim, queries_.codes + row * dim, queries_.sums + row * (dim / 16));
      }
    }
  }

  void piece(size_t index) const {
    const size_t dim = layout_.head_dim;
    const size_t ranges = partition_.split ? partition_.range_count : 1;
    const size_t tile = index / ranges % partition_.tiles;
    const size_t kv_head = index / ranges / partition_.tiles;
    const size_t first = tile * partition_.tile_rows;
    const size_t count = std::min(partition_.tile_rows, partition_.rows - first);
    if (partition_.split) {
      const size_t range = index % ranges;
      const Sums out = partial(kv_head, range).from(first, dim);
      float maxima[kTileRows];  // other threads write the neighbours of their last place
      float sums[kTileRows];
      attend(kv_head, first, count, range, {maxima, sums, out.outputs});
      std::copy_n(maxima, count, out.maxima);
      std::copy_n(sums, count, out.sums);
      return;
    }
    alignas(64) float outputs[2][kTileRows * KvLayout::kMaxHeadDim];
    float maxima[2][kTileRows];
    float sums[2][kTileRows];
    const Sums total{maxima[0], sums[0], outputs[0]};
    const Sums next{maxima[1], sums[1], outputs[1]};
    attend(kv_head, first, count, 0, total);
    for (size_t range = 1; range < partition_.range_count; ++range) {
      attend(kv_head, first, count, range, next);
      total.add(next, count, dim);
    }
    finish(kv_head, first, count, total);
  }

  // Joins the ranges of the rows of one kv head.
  void combine(size_t kv_head) const {
    const Sums total = partial(kv_head, 0);
    for (size_t range = 1; range < partition_.range_count; ++range) {
      total.add(partial(kv_head, range), partition_.rows, layout_.head_dim);
    }
    finish(kv_head, 0, partition_.rows, total);
  }

 private:
  struct Sizes {  // of memory, in elements
    size_t rows;
    size_t values;
    size_t codes;
    size_t sums;
    size_t offsets;
    size_t partials;
  };
  Sizes sizes() const {
    const size_t rows = layout_.kv_heads * partition_.rows;
    const size_t values = rows * layout_.head_dim;
    return {.rows = rows,
            .values = values,
            .codes = partition_.integer ? values : 0,
            .sums = values / 16,
            .offsets = rows * 2 * pairs(),
            .partials = partition_.split ? rows * partition_.range_count : 0};
  }

  // `count` rows from `first` on over the blocks of one range that they see.
  void attend(size_t kv_head, size_t first, size_t count, size_t range, const Sums& out) const {
    const size_t dim = layout_.head_dim;
    out.clear(count, dim);
    const size_t index = partition_.first_range + range;
    const size_t begin = std::max(partition_.ranges.start(index),
                                  first_seen(args_.past + first / partition_.group, args_.window) / kBlock);
    const size_t end = std::min(partition_.ranges.start(index + 1),
                                divide_up(args_.past + (first + count - 1) / partition_.group + 1, kBlock));
    const Queries queries = slice(kv_head, first, count);
    const auto type = static_cast<size_t>(layout_.type);
    alignas(64) float scores[kTileRows * kBlock];
    for (size_t b = begin; b < end; ++b) {
      const std::byte* const block = block_of(kv_head, b);
      simd_.scores[type](queries, block, scores);
      if (args_.offsets != nullptr) add_offsets(kv_head, first, count, b * kBlock, scores);
      mask(first, count, b * kBlock, scores);
      for (size_t q = 0; q < count; ++q) {
        simd_.softmax(scores + q * kBlock, out.maxima + q, out.sums + q, out.outputs + q * dim, dim);
      }
      simd_.values[type](scores, count, dim, block + layout_.values_offset(), out.outputs);
    }
  }

  Sums partial(size_t kv_head, size_t range) const {
    const size_t row = (kv_head * partition_.range_count + range) * partition_.rows;
    return partial_.from(row, layout_.head_dim);
  }

  Queries slice(size_t kv_head, size_t first, size_t count) const {
    const size_t dim = layout_.head_dim;
    const size_t row = kv_head * partition_.rows + first;
    const size_t codes = partition_.integer ? row * dim : 0;
    return {count,
            dim,
            queries_.values + row * dim,
            queries_.codes + codes,
            queries_.scales + row,
            queries_.sums + row * (dim / 16)};
  }

  std::byte* block_of(size_t kv_head, size_t block) const {
    return args_.cache + layout_.block_offset(kv_head, block % args_.cache_blocks * kBlock);
  }

  // Adds one head's key and value to the cache.
  void store(size_t kv_head, size_t position, const float* key_in, const float* value_in, const float* cos,
             const float* sin) const {
    const size_t dim = layout_.head_dim;
    float key[KvLayout::kMaxHeadDim];
    if (args_.offsets != nullptr) {
      std::copy_n(key_in, dim, key);
      args_.offsets->subtract(kv_head, key);
      key_in = key;
    }
    rotate(key_in, args_.k_norm_weight, cos, sin, 1, key);
    if (partition_.integer) simd_.hadamard(key, dim);
    float value[KvLayout::kMaxHeadDim];
    if (args_.value_norm) {
      const float inverse = inverse_rms(value_in, dim, args_.epsilon);
      for (size_t e = 0; e < dim; ++e) value[e] = value_in[e] * inverse;
      value_in = value;
    }
    append(layout_, block_of(kv_head, position / kBlock), position % kBlock, key, value_in);
  }

  // RMSNorm, where there is a weight, RoPE and a factor, of one head; all in float32.
  void rotate(const float* head, const float* norm_weight, const float* cos, const float* sin, float scale,
              float* out) const {
    const size_t dim = layout_.head_dim;
    const float factor = norm_weight != nullptr ? inverse_rms(head, dim, args_.epsilon) : 1;
    simd_.rotate(head, dim, factor, norm_weight, cos, sin, scale, out);
  }

  size_t pairs() const { return args_.offsets != nullptr ? args_.offsets->pairs() : 0; }

  void add_offsets(size_t kv_head, size_t first, size_t count, size_t position, float* scores) const {
    for (size_t q = 0; q < count; ++q) {
      const float* const prepared = queries_.offsets + (kv_head * partition_.rows + first + q) * 2 * pairs();
      args_.offsets->add(kv_head, prepared, position, scores + q * kBlock);
    }
  }

  // No query sees what comes after its token, nor what is before its window. position: of the first score.
  void mask(size_t first, size_t count, size_t position, float* scores) const {
    const auto clamped = [position](size_t p) { return std::clamp(p, position, position + kBlock) - position; };
    for (size_t q = 0; q < count; ++q) {
      const size_t token = args_.past + (first + q) / partition_.group;
      float* const its = scores + q * kBlock;
      std::fill(its, its + clamped(first_seen(token, args_.window)), kMinusInfinity);
      std::fill(its + clamped(token + 1), its + kBlock, kMinusInfinity);
    }
  }

  void finish(size_t kv_head, size_t first, size_t count, const Sums& total) const {
    const size_t dim = layout_.head_dim;
    for (size_t i = 0; i < count; ++i) {
      const size_t row = first + i;
      const size_t head = kv_head * partition_.group + row % partition_.group;
      float* const out = args_.out + (row / partition_.group * args_.heads + head) * dim;
      const float inverse = 1 / total.sums[i];
      for (size_t e = 0; e < dim; ++e) out[e] = total.outputs[i * dim + e] * inverse;
    }
  }

  const Simd& simd_;
  const KvLayout& layout_;
  const AttentionArgs& args_;
  const Partition partition_;
  Prepared queries_{};
  Sums partial_{};  // [kv_heads, ranges, rows], if each range is a piece
};

}  // namespace

void attention(const Simd& simd, const KvLayout& layout, std::span<const AttentionArgs> sequences,
               const Parallel& parallel) {
  // What takes some microseconds is over before another thread has taken its share.
  constexpr size_t kSerialBytes = 64 << 10;
  thread_local Scratch scratch;
  thread_local std::vector<Attention> all;  // keeps its memory
  all.clear();
  size_t bytes = 0;
  size_t pieces = 0;
  size_t work = 0;
  bool split = false;
  for (const AttentionArgs& args : sequences) {
    const Attention& its = all.emplace_back(simd, layout, args);
    bytes += its.scratch_bytes();
    pieces += its.pieces();
    work += its.work();
    split |= its.split();
  }
  scratch.begin(bytes);
  for (Attention& its : all) its.take(scratch);
  const Parallel threads = work < kSerialBytes ? Parallel{} : parallel;
  const std::span<const Attention> each = all;  // `all` is another one in another thread
  const size_t heads = layout.kv_heads;
  threads(each.size() * heads, [each, heads](size_t index) { each[index / heads].prepare(index % heads); });
  threads(pieces, [each](size_t index) {
    const Attention* its = each.data();
    for (; index >= its->pieces(); ++its) index -= its->pieces();
    its->piece(index);
  });
  if (!split) return;
  threads(each.size() * heads, [each, heads](size_t index) {
    if (each[index / heads].split()) each[index / heads].combine(index % heads);
  });
}

}  // namespace meki
