// meki.Linear: docs/package-format.md, "Operators".

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

constexpr size_t kMostParts = 64;

// Type and outputs of the matrices in a weight.
std::vector<Constant::Part> parts_of(const Constant& table) {
  require(table.shape.rank == 2 && table.shape.sizes[1] == 2 && table.shape.sizes[0] > 0 &&
              table.shape.sizes[0] <= static_cast<int64_t>(kMostParts),
          "parts are not [1 to 64, 2]");
  std::vector<Constant::Part> parts;
  const auto* const values = static_cast<const int64_t*>(table.data);
  for (size_t i = 0; i < table.shape.elements(); i += 2) {
    require(values[i] > 0 && values[i] < static_cast<int64_t>(kWeightTypes), "a part has no packed type");
    require(values[i + 1] > 0 && values[i + 1] <= INT32_MAX, "a part has no outputs");
    parts.push_back({static_cast<WeightType>(values[i]), static_cast<size_t>(values[i + 1])});
  }
  return parts;
}

// Inputs: x, weight, parts, and, each optional, norm_weight, residual, post_norm_weight.
class LinearKernel final : public Kernel {
 public:
  LinearKernel(const Definition& node, KvType)
      : weights_(node.constant(1).packed(parts_of(node.constant(2)))), has_residual_(node.has_input(4)) {
    for (const PackedWeight& weight : weights_) outputs_ += weight.outputs;
    input_.epsilon = end_.epsilon = node.number("epsilon");
    if (node.flag("swiglu")) input_.kind = LinearInput::Kind::swiglu;
    if (node.choice("geglu", 2) == 1) {
      require(input_.kind == LinearInput::Kind::plain, "both swiglu and geglu are asked for");
      input_.kind = LinearInput::Kind::geglu;
    }
    if (node.has_input(5)) end_.post_norm_weight = node.constant(5).floats(outputs_);
    if (node.has_input(3)) {
      require(input_.kind == LinearInput::Kind::plain, "both a norm and swiglu or geglu are asked for");
      input_.kind = LinearInput::Kind::norm;
      input_.norm_weight = node.constant(3).floats(inputs());
    }
  }

  void compute(const Call& call) const override {
    Shape shape = call.input_shape(0);
    require(shape.rank >= 1, "x is a scalar");
    LinearInput input = input_;
    input.x = call.input<float>(0);
    input.stride = static_cast<size_t>(shape.last());
    const bool gated = input.kind == LinearInput::Kind::swiglu || input.kind == LinearInput::Kind::geglu;
    const bool fits = gated ? input.stride >= 2 * inputs() : input.stride == inputs();
    require(fits, "x and the weight have different widths");
    const size_t tokens = shape.elements() / input.stride;
    shape.sizes[shape.rank - 1] = static_cast<int64_t>(outputs_);
    LinearEnd end = end_;
    if (has_residual_) {
      const Shape added = call.input_shape(4);
      require(added.rank == shape.rank && added.sizes == shape.sizes, "the residual has another shape than the output");
      end.residual = call.input<float>(4);
    }
    linear(simd(), weights_, input, end, tokens, call.output<float>(0, shape), call.parallel());
  }

 private:
  size_t inputs() const { return weights_.front().inputs; }

  std::vector<PackedWeight> weights_;
  size_t outputs_ = 0;
  LinearInput input_;  // but for x
  LinearEnd end_;      // but for the residual
  bool has_residual_;
};

}  // namespace

Kind linear() {
  using ort::kFloat, ort::kUint8, ort::kInt64;
  return {"Linear", 3, {kFloat, kUint8, kInt64, kFloat, kFloat, kFloat}, {kFloat}, make_kernel<LinearKernel>};
}

}  // namespace meki::ops
