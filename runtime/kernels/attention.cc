#include "runtime/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/kernels/norm.h"
#include "runtime/kernels/rounding.h"
#include "runtime/kernels/scratch.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kTileRows = 32;  // queries of one pass over the cache: what keeps a block of it in the nearest caches
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

// How the work is cut into pieces of work. A row is one query head of one token; the rows of a kv head are ordered by
// token, then head. A piece is a tile of rows of one kv head against one range of cache blocks.
struct Partition {
  size_t group;  // query heads of a kv head
  size_t rows;   // of one kv head
  size_t tile_rows;
  size_t tiles;         // of one kv head
  size_t first_block;   // that is seen
  size_t splits;        // ranges of cache blocks
  size_t split_blocks;  // in one range
  bool integer;

  Partition(const KvLayout& layout, const AttentionArgs& args)
      : group(args.heads / layout.kv_heads),
        rows(args.tokens * group),
        tile_rows(std::min(rows, kTileRows)),
        tiles(divide_up(rows, tile_rows)),
        first_block(first_seen(args.past, args.window) / kBlock),
        integer(layout.type == KvType::int8 || layout.type == KvType::int4) {
    // Enough for any number of threads, and the same for all: sums of other pieces would be other sums.
    constexpr size_t kPieces = 64;
    const size_t blocks = divide_up(args.past + args.tokens, kBlock) - first_block;
    const size_t wanted = divide_up(kPieces, tiles * layout.kv_heads);
    split_blocks = std::max<size_t>(2, divide_up(blocks, wanted));
    splits = divide_up(blocks, split_blocks);
  }
};

// What a piece leaves behind for one row when there are several splits: the running maximum, sum and output.
struct Partial {
  float* maxima;   // [kv_heads, rows, splits]
  float* sums;     // [kv_heads, rows, splits]
  float* outputs;  // [kv_heads, rows, splits, head_dim]
};

// The queries of all kv heads, as struct Queries has them.
struct Prepared {
  float* values;
  int8_t* high;
  int8_t* low;
  float* scales;
  int32_t* sums;
  float* offsets;  // [kv_heads, rows, 2 * KeyOffsets::pairs()], of KeyOffsets::prepare
};

// RMSNorm, where there is a weight, then RoPE; both in float32.
void normalise_and_rotate(float* head, size_t head_dim, const float* norm_weight, float epsilon, const float* cos,
                          const float* sin) {
  if (norm_weight != nullptr) {
    const float inverse = inverse_rms(head, head_dim, epsilon);
    for (size_t e = 0; e < head_dim; ++e) head[e] = head[e] * inverse * norm_weight[e];
  }
  const size_t half = head_dim / 2;
  for (size_t e = 0; e < half; ++e) {
    const float a = head[e];
    const float b = head[half + e];
    head[e] = a * cos[e] - b * sin[e];
    head[half + e] = b * cos[e] + a * sin[e];
  }
}

// Multiplies by the orthonormal Hadamard matrix, in runs of the largest power of two that divides the size.
void hadamard(float* values, size_t size) {
  const size_t run = size & (~size + 1);
  for (size_t stride = 1; stride < run; stride *= 2) {
    for (size_t first = 0; first < size; first += 2 * stride) {
      for (size_t i = first; i < first + stride; ++i) {
        const float a = values[i];
        const float b = values[i + stride];
        values[i] = a + b;
        values[i + stride] = a - b;
      }
    }
  }
  const float norm = 1 / std::sqrt(static_cast<float>(run));
  for (size_t i = 0; i < size; ++i) values[i] *= norm;
}

// A query in 15 bits: scale * (128 * high + low).
void quantize_query(const float* query, size_t head_dim, const Prepared& out, size_t row) {
  constexpr float kLargest = 127 * 128;
  const float largest = largest_magnitude(query, head_dim);
  const float inverse = quantizer(kLargest, largest);
  out.scales[row] = largest / kLargest;
  int8_t* const high = out.high + row * head_dim;
  int8_t* const low = out.low + row * head_dim;
  for (size_t g = 0; g < head_dim / 16; ++g) {
    int32_t sum = 0;
    for (size_t e = 16 * g; e < 16 * (g + 1); ++e) {
      const int32_t code = std::clamp(round_to_int(query[e] * inverse), -127 * 128, 127 * 128);
      high[e] = static_cast<int8_t>(code >> 7);
      low[e] = static_cast<int8_t>(code & 127);
      sum += code;
    }
    out.sums[row * (head_dim / 16) + g] = sum;
  }
}

class Attention {
 public:
  Attention(const Simd& simd, const KvLayout& layout, const AttentionArgs& args)
      : simd_(simd), layout_(layout), args_(args), partition_(layout, args) {
    const size_t dim = layout.head_dim;
    const size_t rows = layout.kv_heads * partition_.rows;
    const size_t partials = partition_.splits > 1 ? rows * partition_.splits : 0;
    const size_t codes = partition_.integer ? rows * dim : 0;
    const size_t offsets = rows * 2 * pairs();
    thread_local Scratch scratch;
    scratch.begin(Scratch::bytes<float>(rows * dim) + 2 * Scratch::bytes<int8_t>(codes) + Scratch::bytes<float>(rows) +
                  Scratch::bytes<int32_t>(rows * dim / 16) + Scratch::bytes<float>(offsets) +
                  2 * Scratch::bytes<float>(partials) + Scratch::bytes<float>(partials * dim));
    queries_ = {scratch.take<float>(rows * dim),
                scratch.take<int8_t>(codes),
                scratch.take<int8_t>(codes),
                scratch.take<float>(rows),
                scratch.take<int32_t>(rows * dim / 16),
                scratch.take<float>(offsets)};
    partial_ = {scratch.take<float>(partials), scratch.take<float>(partials), scratch.take<float>(partials * dim)};
  }

  size_t pieces() const { return layout_.kv_heads * partition_.tiles * partition_.splits; }
  size_t splits() const { return partition_.splits; }

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
        std::copy_n(args_.qkv + t * width + (kv_head * partition_.group + g) * dim, dim, query);
        normalise_and_rotate(query, dim, args_.q_norm_weight, args_.epsilon, cos, sin);
        for (size_t e = 0; e < dim; ++e) query[e] *= args_.scale;
        if (args_.offsets != nullptr) args_.offsets->prepare(kv_head, query, queries_.offsets + row * 2 * pairs());
        if (layout_.type == KvType::int4) hadamard(query, dim);
        if (partition_.integer) quantize_query(query, dim, queries_, row);
      }
    }
  }

  void piece(size_t index) const {
    const size_t split = index % partition_.splits;
    const size_t tile = index / partition_.splits % partition_.tiles;
    const size_t kv_head = index / partition_.splits / partition_.tiles;
    const size_t first = tile * partition_.tile_rows;
    const size_t count = std::min(partition_.tile_rows, partition_.rows - first);
    // Only blocks that the tile's tokens may see.
    const size_t begin = std::max(partition_.first_block + split * partition_.split_blocks,
                                  first_seen(args_.past + first / partition_.group, args_.window) / kBlock);
    const size_t end = std::min(partition_.first_block + (split + 1) * partition_.split_blocks,
                                divide_up(args_.past + (first + count - 1) / partition_.group + 1, kBlock));
    const size_t dim = layout_.head_dim;
    const Queries queries = slice(kv_head, first, count);
    alignas(64) float scores[kTileRows * kBlock];
    alignas(64) float outputs[kTileRows * KvLayout::kMaxHeadDim];
    float maxima[kTileRows];
    float sums[kTileRows];
    std::fill_n(outputs, count * dim, 0.0F);
    std::fill_n(maxima, count, kMinusInfinity);
    std::fill_n(sums, count, 0.0F);

    const auto type = static_cast<size_t>(layout_.type);
    for (size_t b = begin; b < end; ++b) {
      const std::byte* const block = block_of(kv_head, b);
      const std::byte* const next = b + 1 < end ? block_of(kv_head, b + 1) : nullptr;
      const size_t values = layout_.values_offset();
      simd_.scores[type](queries, block, next, scores);
      if (args_.offsets != nullptr) add_offsets(kv_head, first, count, b * kBlock, scores);
      mask(first, count, b * kBlock, scores);
      for (size_t q = 0; q < count; ++q) {
        simd_.softmax(scores + q * kBlock, maxima + q, sums + q, outputs + q * dim, dim);
      }
      simd_.values[type](scores, count, dim, block + values, next != nullptr ? next + values : nullptr, outputs);
    }
    for (size_t q = 0; q < count; ++q) {
      if (partition_.splits == 1) {
        finish(kv_head, first + q, outputs + q * dim, sums[q]);
      } else {
        const size_t at = (kv_head * partition_.rows + first + q) * partition_.splits + split;
        partial_.maxima[at] = maxima[q];
        partial_.sums[at] = sums[q];
        std::copy_n(outputs + q * dim, dim, partial_.outputs + at * dim);
      }
    }
  }

  // Joins the splits of the rows of one kv head.
  void combine(size_t kv_head) const {
    const size_t dim = layout_.head_dim;
    float output[KvLayout::kMaxHeadDim];
    for (size_t row = 0; row < partition_.rows; ++row) {
      const size_t at = (kv_head * partition_.rows + row) * partition_.splits;
      const float largest = *std::max_element(partial_.maxima + at, partial_.maxima + at + partition_.splits);
      float sum = 0;
      std::fill_n(output, dim, 0.0F);
      for (size_t split = at; split < at + partition_.splits; ++split) {
        const float weight = std::exp(partial_.maxima[split] - largest);
        sum += weight * partial_.sums[split];
        for (size_t e = 0; e < dim; ++e) output[e] += weight * partial_.outputs[split * dim + e];
      }
      finish(kv_head, row, output, sum);
    }
  }

 private:
  Queries slice(size_t kv_head, size_t first, size_t count) const {
    const size_t dim = layout_.head_dim;
    const size_t row = kv_head * partition_.rows + first;
    const size_t codes = partition_.integer ? row * dim : 0;
    return {count,
            dim,
            queries_.values + row * dim,
            queries_.high + codes,
            queries_.low + codes,
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
    std::copy_n(key_in, dim, key);
    if (args_.offsets != nullptr) args_.offsets->subtract(kv_head, key);
    normalise_and_rotate(key, dim, args_.k_norm_weight, args_.epsilon, cos, sin);
    if (layout_.type == KvType::int4) hadamard(key, dim);
    float value[KvLayout::kMaxHeadDim];
    const float inverse = args_.value_norm ? inverse_rms(value_in, dim, args_.epsilon) : 1;
    for (size_t e = 0; e < dim; ++e) value[e] = value_in[e] * inverse;
    append(layout_, block_of(kv_head, position / kBlock), position % kBlock, key, value);
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

  void finish(size_t kv_head, size_t row, const float* output, float sum) const {
    const size_t dim = layout_.head_dim;
    const size_t head = kv_head * partition_.group + row % partition_.group;
    float* const out = args_.out + (row / partition_.group * args_.heads + head) * dim;
    const float inverse = 1 / sum;
    for (size_t e = 0; e < dim; ++e) out[e] = output[e] * inverse;
  }

  const Simd& simd_;
  const KvLayout& layout_;
  const AttentionArgs& args_;
  const Partition partition_;
  Prepared queries_{};
  Partial partial_{};
};

}  // namespace

void attention(const Simd& simd, const KvLayout& layout, const AttentionArgs& args, const Parallel& parallel) {
  // What takes some microseconds is over before another thread has taken its share.
  constexpr size_t kSerialBytes = 64 << 10;
  const size_t seen = args.past + args.tokens - first_seen(args.past, args.window);
  const bool small = layout.bytes(seen) * args.tokens < kSerialBytes;
  const Parallel threads = small ? Parallel{} : parallel;
  const Attention work(simd, layout, args);
  threads(layout.kv_heads, [&work](size_t kv_head) { work.prepare(kv_head); });
  threads(work.pieces(), [&work](size_t index) { work.piece(index); });
  if (work.splits() > 1) threads(layout.kv_heads, [&work](size_t kv_head) { work.combine(kv_head); });
}

}  // namespace meki
