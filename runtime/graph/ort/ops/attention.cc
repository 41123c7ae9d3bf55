// meki.Attention: docs/package-format.md, "Operators".

#include "runtime/kernels/attention.h"

#include <optional>

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

// Inputs: qkv, past, total_sequence_length, cos, sin, with QK-norm q_norm_weight, k_norm_weight, and else maybe
// key_offsets.
class AttentionKernel final : public Kernel {
 public:
  AttentionKernel(const Definition& node, KvType kv_type)
      : heads_(node.positive("heads")),
        kv_heads_(node.positive("kv_heads")),
        epsilon_(node.number("epsilon")),
        cos_(node.constant(3)),
        sin_(node.constant(4)),
        layout_(kv_type, kv_heads_, 2 * static_cast<size_t>(cos_.shape.sizes[1])) {
    require(heads_ % kv_heads_ == 0, "heads is not a multiple of kv_heads");
    require(cos_.shape.rank == 2 && sin_.shape.rank == 2 && cos_.shape.sizes == sin_.shape.sizes,
            "the rotary tables are not two of [context, head_dim / 2]");
    require(node.has_input(5) == node.has_input(6), "q_norm_weight and k_norm_weight come together or not at all");
    if (node.has_input(7)) {
      require(!node.has_input(5), "key_offsets do not go with QK-norm");
      offsets_.emplace(node.constant(7).floats(kv_heads_ * layout_.head_dim), layout_, floats(cos_), floats(sin_),
                       static_cast<size_t>(cos_.shape.sizes[0]));
    }
    if (!node.has_input(5)) return;
    q_norm_weight_ = node.constant(5).floats(layout_.head_dim);
    k_norm_weight_ = node.constant(6).floats(layout_.head_dim);
  }

  void compute(const Call& call) const override {
    const Shape qkv = call.input_shape(0);
    const size_t head_dim = layout_.head_dim;
    require(qkv.rank == 3 && qkv.sizes[0] == 1 && qkv.sizes[1] > 0 &&
                static_cast<size_t>(qkv.last()) == (heads_ + 2 * kv_heads_) * head_dim,
            "qkv is not [1, tokens, (heads + 2 * kv_heads) * head_dim]");
    const auto tokens = static_cast<size_t>(qkv.sizes[1]);
    require(call.input_shape(2).elements() == 1, "total_sequence_length is not one integer");
    const int32_t total = *call.input<int32_t>(2);
    require(total >= 0 && static_cast<size_t>(total) >= tokens, "the sequence is shorter than this step");
    const auto length = static_cast<size_t>(total);
    const Shape blocks = call.input_shape(1);
    require(blocks.rank == 3 && static_cast<size_t>(blocks.sizes[1]) == kv_heads_ &&
                static_cast<size_t>(blocks.sizes[2]) == layout_.block_bytes(),
            "the KV cache has other heads or another head_dim");
    require(length <= static_cast<size_t>(blocks.sizes[0]) * KvLayout::kBlock,
            "the sequence is longer than the KV cache");
    require(length <= static_cast<size_t>(cos_.shape.sizes[0]), "the sequence is longer than the rotary tables");
    auto* const cache = call.output<std::byte>(1, blocks);
    require(cache == call.input<std::byte>(1), "past and present are not the same memory");
    const AttentionArgs args{
        .heads = heads_,
        .tokens = tokens,
        .past = length - tokens,
        .qkv = call.input<float>(0),
        .cos = floats(cos_),
        .sin = floats(sin_),
        .q_norm_weight = q_norm_weight_,
        .k_norm_weight = k_norm_weight_,
        .epsilon = epsilon_,
        .offsets = offsets_ ? &*offsets_ : nullptr,
        .cache = cache,
        .out = call.output<float>(0, {{1, qkv.sizes[1], static_cast<int64_t>(heads_ * head_dim)}, 3}),
    };
    attention(simd(), layout_, args, call.parallel());
  }

 private:
  static const float* floats(const Constant& constant) { return static_cast<const float*>(constant.data); }

  size_t heads_;
  size_t kv_heads_;
  float epsilon_;
  Constant cos_;
  Constant sin_;
  KvLayout layout_;
  const float* q_norm_weight_ = nullptr;
  const float* k_norm_weight_ = nullptr;
  std::optional<KeyOffsets> offsets_;
};

}  // namespace

Kind attention() {
  using ort::kFloat, ort::kUint8, ort::kInt32;
  return {"Attention",
          5,
          {kFloat, kUint8, kInt32, kFloat, kFloat, kFloat, kFloat, kFloat},
          {kFloat, kUint8},
          make_kernel<AttentionKernel>};
}

}  // namespace meki::ops
