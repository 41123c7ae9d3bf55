// meki.Injection: docs/package-format.md, "Operators".

#include "runtime/kernels/injection.h"

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

// Inputs: x, h, norm_weight (may be left out), gate_proj, rows, out_proj, post_norm_weight, and, each optional,
// context, context_norm_weight, scale.
class InjectionKernel final : public Kernel {
 public:
  InjectionKernel(const Definition& node, KvType)
      : layer_(node.index("layer")),
        epsilon_(node.number("epsilon")),
        context_layer_(static_cast<size_t>(node.choice("context_layer", INT32_MAX))),
        row_scale_(node.number("row_scale", 1)) {
    for (size_t index = 3; index < 7; ++index) require(node.has_input(index), "an input is missing");
    fusion_ = {static_cast<Fusion::Activation>(node.choice("activation", 3)), node.choice("multiply", 2) == 1};
    const size_t hidden = node.constant(6).shape.elements();
    if (node.has_input(2)) norm_weight_ = node.constant(2).floats(hidden);
    post_norm_weight_ = node.constant(6).floats(hidden);
    out_proj_ = node.constant(5).packed(hidden, node.packed_type("out_proj_type"));
    gate_proj_ = node.constant(3).packed(out_proj_.inputs, node.packed_type("gate_proj_type"));
    require(gate_proj_.inputs == hidden, "gate_proj and out_proj have different widths");
    require(node.has_input(7) == node.has_input(8), "context and context_norm_weight come together or not at all");
    require(node.has_input(7) || context_layer_ == 0, "context_layer is given without a context");
    if (node.has_input(8)) context_norm_weight_ = node.constant(8).floats(out_proj_.inputs);
    if (node.has_input(9)) scale_ = *node.constant(9).floats(1);
  }

  void compute(const Call& call) const override {
    const Shape x = call.input_shape(0);
    const Shape h = call.input_shape(1);
    const Shape rows = call.input_shape(4);
    const size_t memory_dim = out_proj_.inputs;
    require(x.rank == 3 && x.sizes[0] == 1 && static_cast<size_t>(x.last()) == out_proj_.outputs,
            "x is not [1, tokens, hidden]");
    require(h.rank == x.rank && h.sizes == x.sizes, "h has another shape than x");
    require(rows.rank == 3 && static_cast<size_t>(rows.sizes[0]) > layer_ && rows.sizes[1] == x.sizes[1] &&
                static_cast<size_t>(rows.last()) == memory_dim,
            "rows are not [more layers than `layer`, tokens, memory_dim]");
    const auto tokens = static_cast<size_t>(x.sizes[1]);
    const float* context = nullptr;
    size_t context_stride = 0;
    if (context_norm_weight_ != nullptr) {
      const Shape all = call.input_shape(7);
      require(all.rank == 3 && all.sizes[0] == 1 && all.sizes[1] == x.sizes[1] &&
                  static_cast<size_t>(all.last()) / memory_dim > context_layer_,
              "context is not [1, tokens, memory_dim of more layers than `context_layer`]");
      context_stride = static_cast<size_t>(all.last());
      context = call.input<float>(7) + context_layer_ * memory_dim;
    }
    inject(simd(),
           {.tokens = tokens,
            .x = call.input<float>(0),
            .h = call.input<float>(1),
            .norm_weight = norm_weight_,
            .gate_proj = gate_proj_,
            .rows = call.input<float>(4) + layer_ * tokens * memory_dim,
            .row_scale = row_scale_,
            .context = context,
            .context_stride = context_stride,
            .context_norm_weight = context_norm_weight_,
            .fusion = fusion_,
            .out_proj = out_proj_,
            .post_norm_weight = post_norm_weight_,
            .epsilon = epsilon_,
            .scale = scale_,
            .out = call.output<float>(0, x)},
           call.parallel());
  }

 private:
  size_t layer_;
  float epsilon_;
  size_t context_layer_;
  float row_scale_;
  float scale_ = 1;
  Fusion fusion_;
  const float* norm_weight_ = nullptr;
  PackedWeight gate_proj_;
  PackedWeight out_proj_;
  const float* post_norm_weight_ = nullptr;
  const float* context_norm_weight_ = nullptr;
};

}  // namespace

Kind injection() {
  using ort::kFloat, ort::kUint8;
  return {"Injection",
          2,
          {kFloat, kFloat, kFloat, kUint8, kFloat, kUint8, kFloat, kFloat, kFloat, kFloat},
          {kFloat},
          make_kernel<InjectionKernel>};
}

}  // namespace meki::ops
