// meki.Linear: docs/package-format.md, "Operators".

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

// Inputs: x, weight, norm_weight (optional), residual (optional).
class LinearKernel final : public Kernel {
 public:
  LinearKernel(const Definition& node, KvType)
      : weight_(node.constant(1).packed(node.positive("outputs"), node.bits())), has_residual_(node.has_input(3)) {
    input_.epsilon = node.number("epsilon");
    if (node.flag("swiglu")) input_.kind = LinearInput::Kind::swiglu;
    if (node.has_input(2)) {
      require(input_.kind == LinearInput::Kind::plain, "both a norm and swiglu are asked for");
      input_.kind = LinearInput::Kind::norm;
      input_.norm_weight = node.constant(2).floats(weight_.inputs);
    }
  }

  void compute(const Call& call) const override {
    Shape shape = call.input_shape(0);
    require(shape.rank >= 1, "x is a scalar");
    LinearInput input = input_;
    input.x = call.input<float>(0);
    input.stride = static_cast<size_t>(shape.last());
    const bool fits =
        input.kind == LinearInput::Kind::swiglu ? input.stride >= 2 * weight_.inputs : input.stride == weight_.inputs;
    require(fits, "x and the weight have different widths");
    const size_t tokens = shape.elements() / input.stride;
    shape.sizes[shape.rank - 1] = static_cast<int64_t>(weight_.outputs);
    const float* residual = nullptr;
    if (has_residual_) {
      const Shape added = call.input_shape(3);
      require(added.rank == shape.rank && added.sizes == shape.sizes, "the residual has another shape than the output");
      residual = call.input<float>(3);
    }
    linear(simd(), weight_, input, residual, tokens, call.output<float>(0, shape), call.parallel());
  }

 private:
  PackedWeight weight_;
  LinearInput input_;  // but for x
  bool has_residual_;
};

}  // namespace

Kind linear() {
  using ort::kFloat, ort::kUint8;
  return {"Linear", 2, {kFloat, kUint8, kFloat, kFloat}, {kFloat}, make_kernel<LinearKernel>};
}

}  // namespace meki::ops
