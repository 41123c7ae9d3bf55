// meki.Injection: docs/package-format.md, "Operators".

#include "runtime/kernels/injection.h"

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

// Inputs: x, h, norm_weight (may be left out), gate_proj, rows, out_proj, post_norm_weight.
class InjectionKernel final : public Kernel {
 public:
  InjectionKernel(const Definition& node, KvType) : layer_(node.index("layer")), epsilon_(node.number("epsilon")) {
    for (size_t index = 3; index < 7; ++index) require(node.has_input(index), "an input is missing");
    fusion_ = {static_cast<Fusion::Activation>(node.choice("activation", 3)), node.choice("multiply", 2) == 1};
    const size_t hidden = node.constant(6).shape.elements();
    if (node.has_input(2)) norm_weight_ = node.constant(2).floats(hidden);
    post_norm_weight_ = node.constant(6).floats(hidden);
    out_proj_ = node.constant(5).packed(hidden, node.packed_type("out_proj_type"));
    gate_proj_ = node.constant(3).packed(out_proj_.inputs, node.packed_type("gate_proj_type"));
    require(gate_proj_.inputs == hidden, "gate_proj and out_proj have different widths");
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
    inject(simd(),
           {.tokens = tokens,
            .x = call.input<float>(0),
            .h = call.input<float>(1),
            .norm_weight = norm_weight_,
            .gate_proj = gate_proj_,
            .rows = call.input<float>(4) + layer_ * tokens * memory_dim,
            .fusion = fusion_,
            .out_proj = out_proj_,
            .post_norm_weight = post_norm_weight_,
            .epsilon = epsilon_,
            .out = call.output<float>(0, x)},
           call.parallel());
  }

 private:
  size_t layer_;
  float epsilon_;
  Fusion fusion_;
  const float* norm_weight_ = nullptr;
  PackedWeight gate_proj_;
  PackedWeight out_proj_;
  const float* post_norm_weight_ = nullptr;
};

}  // namespace

Kind injection() {
  using ort::kFloat, ort::kUint8;
  return {
      "Injection", 2, {kFloat, kFloat, kFloat, kUint8, kFloat, kUint8, kFloat}, {kFloat}, make_kernel<InjectionKernel>};
}

}  // namespace meki::ops
