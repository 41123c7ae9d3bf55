// meki.Attention: docs/package-format.md, "Operators".

#include "runtime/kernels/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "runtime/graph/ort/ops/kernel.h"
#include "runtime/graph/ort/ops/sequences.h"
#include "runtime/kernels/scratch.h"

namespace meki::ops {
namespace {

// A head's rotary positions: tables, or frequencies from which each step's angles are computed. Immutable.
class Rotary {
 public:
  explicit Rotary(const Definition& node) {
    tables_ = node.has_input(3);
    require(tables_ == node.has_input(4) && tables_ != node.has_input(8), "give cos and sin, or frequencies");
    if (tables_) {
      const Constant cos = node.constant(3);
      const Constant sin = node.constant(4);
      require(cos.shape.rank == 2 && sin.shape.rank == 2 && cos.shape.sizes == sin.shape.sizes,
              "the rotary tables are not two of [context, head_dim / 2]");
      cos_ = static_cast<const float*>(cos.data);
      sin_ = static_cast<const float*>(sin.data);
      positions_ = static_cast<size_t>(cos.shape.sizes[0]);
      half_ = static_cast<size_t>(cos.shape.sizes[1]);
      const auto stated = static_cast<size_t>(node.choice("head_dim", INT32_MAX));
      require(stated == 0 || stated == head_dim(), "head_dim is another than that of the rotary tables");
      return;
    }
    const size_t head_dim = node.positive("head_dim");
    const Constant rates = node.constant(8);
    require(head_dim % 2 == 0 && rates.shape.rank == 1 && rates.shape.elements() <= head_dim / 2,
            "frequencies are not [at most head_dim / 2]");
    half_ = head_dim / 2;
    for (size_t i = 0; i < rates.shape.elements(); ++i) {
      const double rate = static_cast<const double*>(rates.data)[i];
      rates_.push_back({rate, std::cos(rate), std::sin(rate)});
    }
  }

  size_t head_dim() const { return 2 * half_; }
  bool has_tables() const { return tables_; }
  size_t positions() const { return positions_; }  // of the tables
  const float* cos() const { return cos_; }
  const float* sin() const { return sin_; }

  // What lines() takes at most of a scratch for so many tokens, of as many sequences perhaps.
  size_t scratch_bytes(size_t tokens) const { return tables_ ? 0 : 2 * tokens * Scratch::bytes<float>(half_); }
  // cos and sin of `tokens` tokens from `position` on, [tokens, head_dim / 2]; in `scratch` unless they are in tables.
  std::array<const float*, 2> lines(size_t position, size_t tokens, Scratch& scratch) const {
    if (tables_) {
      require(position + tokens <= positions_, "the sequence is longer than the rotary tables");
      return {cos_ + position * half_, sin_ + position * half_};
    }
    auto* const cos = scratch.take<float>(tokens * half_);
    auto* const sin = scratch.take<float>(tokens * half_);
    std::fill_n(cos, tokens * half_, 1.0F);
    std::fill_n(sin, tokens * half_, 0.0F);
    for (size_t i = 0; i < rates_.size(); ++i) {
      const auto& [rate, step_cos, step_sin] = rates_[i];
      const double angle = static_cast<double>(position) * rate;
      double x = std::cos(angle);
      double y = std::sin(angle);
      for (size_t t = i; t < tokens * half_; t += half_) {
        cos[t] = static_cast<float>(x);
        sin[t] = static_cast<float>(y);
        const double turned = x * step_cos - y * step_sin;  // to the next position
        y = x * step_sin + y * step_cos;
        x = turned;
      }
    }
    return {cos, sin};
  }

 private:
  struct Rate {
    double angle;  // of one position
    double cos;
    double sin;
  };
  bool tables_ = false;
  const float* cos_ = nullptr;  // [positions, head_dim / 2], of tables
  const float* sin_ = nullptr;
  size_t positions_ = 0;
  size_t half_ = 0;
  std::vector<Rate> rates_;  // of the first pairs; the others do not turn
};

// Inputs: qkv, past, total_sequence_length, cos, sin, q_norm_weight, k_norm_weight, key_offsets, frequencies.
class AttentionKernel final : public Kernel {
 public:
  AttentionKernel(const Definition& node, KvType kv_type)
      : heads_(node.positive("heads")),
        kv_heads_(node.positive("kv_heads")),
        epsilon_(node.number("epsilon")),
        shared_(node.choice("shared", 2) == 1),
        value_norm_(node.choice("value_norm", 2) == 1),
        window_(static_cast<size_t>(node.choice("window", int64_t{INT32_MAX} + 1))),
        rotary_(node),
        layout_(kv_type, kv_heads_, rotary_.head_dim()),
        scale_(node.number("scale", 1 / std::sqrt(static_cast<float>(layout_.head_dim)))) {
    require(heads_ % kv_heads_ == 0, "heads is not a multiple of kv_heads");
    require(node.outputs() == (shared_ ? 1 : 2), "the cache is an output unless it is shared");
    const bool norms = node.has_input(5);
    require(node.has_input(6) == (norms && !shared_),
            "q_norm_weight and k_norm_weight come together or not at all, with `shared` the first alone");
    require(!shared_ || !value_norm_, "value_norm does not go with `shared`");
    if (node.has_input(7)) {
      require(!norms, "key_offsets do not go with QK-norm");
      require(!shared_ && rotary_.has_tables(), "key_offsets go with keys and rotary tables");
      offsets_.emplace(node.constant(7).floats(kv_heads_ * layout_.head_dim), layout_, rotary_.cos(), rotary_.sin(),
                       rotary_.positions());
    }
    if (norms) q_norm_weight_ = node.constant(5).floats(layout_.head_dim);
    if (node.has_input(6)) k_norm_weight_ = node.constant(6).floats(layout_.head_dim);
  }

  void compute(const Call& call) const override {
    const Shape qkv = call.input_shape(0);
    const size_t head_dim = layout_.head_dim;
    const size_t width = (heads_ + (shared_ ? 0 : 2 * kv_heads_)) * head_dim;
    require(qkv.rank == 3 && qkv.sizes[0] == 1 && qkv.sizes[1] > 0 && static_cast<size_t>(qkv.last()) == width,
            shared_ ? "qkv is not [1, tokens, heads * head_dim]"
                    : "qkv is not [1, tokens, (heads + 2 * kv_heads) * head_dim]");
    const auto tokens = static_cast<size_t>(qkv.sizes[1]);
    const Shape blocks = call.input_shape(1);
    require(blocks.rank == 3 && static_cast<size_t>(blocks.sizes[1]) == kv_heads_ &&
                static_cast<size_t>(blocks.sizes[2]) == layout_.block_bytes(),
            "the KV cache has other heads or another head_dim");
    const auto* const x = call.input<float>(0);
    auto* const out = call.output<float>(0, {{1, qkv.sizes[1], static_cast<int64_t>(heads_ * head_dim)}, 3});
    thread_local Scratch scratch;
    thread_local std::vector<AttentionArgs> sequences;  // keeps its memory
    scratch.begin(rotary_.scratch_bytes(tokens));
    sequences.clear();
    each_sequence(call, tokens, 1, shared_ ? kNoOutput : 1, 2, [&](const SequencePart& part) {
      const size_t cache_blocks = part.state.size() / (kv_heads_ * layout_.block_bytes());
      require(cache_blocks % KvLayout::kRun == 0, "the KV cache is not of whole runs of blocks");
      // All blocks from the first that is seen to the last that is written.
      const size_t first = first_seen(part.past, window_);
      const size_t length = part.past + part.tokens;
      require((length + KvLayout::kBlock - 1) / KvLayout::kBlock - first / KvLayout::kBlock <= cache_blocks,
              "the sequence is longer than the KV cache, or the window is another than the manifest's");
      const auto [cos, sin] = rotary_.lines(part.past, part.tokens, scratch);
      sequences.push_back({
          .heads = heads_,
          .tokens = part.tokens,
          .past = part.past,
          .shared = shared_,
          .qkv = x + part.first * width,
          .cos = cos,
          .sin = sin,
          .q_norm_weight = q_norm_weight_,
          .k_norm_weight = k_norm_weight_,
          .value_norm = value_norm_,
          .epsilon = epsilon_,
          .scale = scale_,
          .offsets = offsets_ ? &*offsets_ : nullptr,
          .window = window_,
          .cache = part.state.data(),
          .cache_blocks = cache_blocks,
          .out = out + part.first * heads_ * head_dim,
      });
    });
    attention(simd(), layout_, sequences, call.parallel());
  }

 private:
  size_t heads_;
  size_t kv_heads_;
  float epsilon_;
  bool shared_;  // keys and values are another layer's
  bool value_norm_;
  size_t window_;
  Rotary rotary_;
  KvLayout layout_;
  float scale_;
  const float* q_norm_weight_ = nullptr;
  const float* k_norm_weight_ = nullptr;
  std::optional<KeyOffsets> offsets_;
};

}  // namespace

Kind attention() {
  using ort::kFloat, ort::kDouble, ort::kUint8, ort::kInt32;
  return {"Attention",
          3,
          {kFloat, kUint8, kInt32, kFloat, kFloat, kFloat, kFloat, kFloat, kDouble},
          {kFloat, kUint8},
          make_kernel<AttentionKernel>};
}

}  // namespace meki::ops
