// meki.Embedding: docs/package-format.md, "Operators".

#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {
namespace {

// Inputs: ids, weight.
class EmbeddingKernel final : public Kernel {
 public:
  EmbeddingKernel(const Definition& node, KvType)
      : weight_(node.constant(1).packed(node.positive("outputs"), node.packed_type("type"))) {}

  void compute(const Call& call) const override {
    const Shape ids = call.input_shape(0);
    require(ids.rank == 2, "ids are not [1, tokens]");
    const auto* const token_ids = call.input<int64_t>(0);
    for (size_t t = 0; t < ids.elements(); ++t) {
      require(token_ids[t] >= 0 && static_cast<size_t>(token_ids[t]) < weight_.outputs,
              "a token id is out of the vocabulary");
    }
    const auto inputs = static_cast<int64_t>(weight_.inputs);
    embedding(weight_, token_ids, ids.elements(), call.output<float>(0, {{ids.sizes[0], ids.sizes[1], inputs}, 3}));
  }

 private:
  PackedWeight weight_;
};

}  // namespace

Kind embedding() {
  using ort::kFloat, ort::kUint8, ort::kInt64;
  return {"Embedding", 2, {kInt64, kUint8}, {kFloat}, make_kernel<EmbeddingKernel>};
}

}  // namespace meki::ops
