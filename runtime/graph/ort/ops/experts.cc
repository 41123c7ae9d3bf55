// meki.Experts: docs/package-format.md, "Operators".

#include "runtime/kernels/experts.h"

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

// Inputs: x, norm_weight, router, gate_up, down, residual (optional).
class ExpertsKernel final : public Kernel {
 public:
  ExpertsKernel(const Definition& node, KvType) : has_residual_(node.has_input(5)) {
    const Constant norm_weight = node.constant(1);
    const Constant router = node.constant(2);
    const size_t hidden = norm_weight.shape.elements();
    args_.norm_weight = norm_weight.floats(hidden);
    args_.epsilon = node.number("epsilon");
    args_.experts = node.positive("experts");
    args_.experts_per_token = node.positive("experts_per_token");
    args_.norm_topk_prob = node.flag("norm_topk_prob");
    require(args_.experts_per_token <= args_.experts, "experts_per_token is more than experts");
    require(hidden > 0 && router.shape.rank == 2 && static_cast<size_t>(router.shape.sizes[0]) == args_.experts &&
                static_cast<size_t>(router.shape.last()) == hidden,
            "the router is not [experts, hidden]");
    args_.router = static_cast<const float*>(router.data);
    args_.down = node.constant(4).experts(args_.experts, hidden, node.weight_type("down_type"));
    args_.gate_up = node.constant(3).experts(args_.experts, 2 * args_.down.inputs, node.weight_type("gate_up_type"));
    require(args_.gate_up.inputs == hidden, "gate_up and down have different widths");
    require((args_.gate_up.type == WeightType::float32) == (args_.down.type == WeightType::float32),
            "one of gate_up and down is packed, the other is not");
  }

  void compute(const Call& call) const override {
    const Shape x = call.input_shape(0);
    require(x.rank == 3 && x.sizes[0] == 1 && static_cast<size_t>(x.last()) == args_.gate_up.inputs,
            "x is not [1, tokens, hidden]");
    ExpertsArgs args = args_;
    args.tokens = static_cast<size_t>(x.sizes[1]);
    args.x = call.input<float>(0);
    if (has_residual_) {
      const Shape added = call.input_shape(5);
      require(added.rank == x.rank && added.sizes == x.sizes, "the residual has another shape than the output");
      args.residual = call.input<float>(5);
    }
    args.out = call.output<float>(0, x);
    mix_experts(simd(), args, call.parallel());
  }

 private:
  ExpertsArgs args_;  // but for what a call gives
  bool has_residual_;
};

}  // namespace

Kind experts() {
  using ort::kFloat, ort::kAny;
  return {"Experts", 5, {kFloat, kFloat, kFloat, kAny, kAny, kFloat}, {kFloat}, make_kernel<ExpertsKernel>};
}

}  // namespace meki::ops
