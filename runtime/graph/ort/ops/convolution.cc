// meki.ShortConvolution: docs/package-format.md, "Operators".

#include "runtime/kernels/convolution.h"

#include "runtime/graph/ort/ops/kernel.h"
#include "runtime/graph/ort/ops/sequences.h"

namespace meki::ops {
namespace {

// Inputs: x, past, total_sequence_length, norm_weight, weight.
class ConvolutionKernel final : public Kernel {
 public:
  ConvolutionKernel(const Definition& node, KvType kv_type) {
    const Constant norm_weight = node.constant(3);
    const Constant weight = node.constant(4);
    args_.channels = norm_weight.shape.elements();
    args_.norm_weight = norm_weight.floats(args_.channels);
    require(args_.channels > 0 && weight.shape.rank == 2 &&
                static_cast<size_t>(weight.shape.last()) == args_.channels && weight.shape.sizes[0] > 0,
            "the weight is not [kernel, channels]");
    args_.weight = static_cast<const float*>(weight.data);
    args_.kernel = static_cast<size_t>(weight.shape.sizes[0]);
    args_.dilation = node.positive("dilation");
    require(args_.kernel - 1 <= INT32_MAX / args_.dilation, "the convolution reaches too far back");
    args_.epsilon = node.number("epsilon");
    args_.kv_type = kv_type;
  }

  void compute(const Call& call) const override {
    const Shape x = call.input_shape(0);
    require(x.rank == 3 && x.sizes[0] == 1 && static_cast<size_t>(x.last()) == args_.channels,
            "x is not [1, tokens, channels]");
    const Shape cache = call.input_shape(1);
    const size_t token_bytes = args_.channels * convolution_bytes(args_.kv_type);
    require(cache.rank == 2 && static_cast<size_t>(cache.last()) == token_bytes,
            "the cache is not [positions, bytes of the channels]");
    const auto* const in = call.input<float>(0);
    auto* const out = call.output<float>(0, x);
    each_sequence(call, static_cast<size_t>(x.sizes[1]), 1, 1, 2, [&](const SequencePart& part) {
      require((part.past + part.tokens) * token_bytes <= part.state.size(), "the sequence is longer than the cache");
      ConvolutionArgs args = args_;
      args.tokens = part.tokens;
      args.past = part.past;
      args.x = in + part.first * args_.channels;
      args.cache = part.state.data();
      args.out = out + part.first * args_.channels;
      convolve(args, call.parallel());
    });
  }

 private:
  ConvolutionArgs args_;  // but for what a call gives
};

}  // namespace

Kind convolution() {
  using ort::kFloat, ort::kUint8, ort::kInt32;
  return {"ShortConvolution",
          5,
          {kFloat, kUint8, kInt32, kFloat, kFloat},
          {kFloat, kUint8},
          make_kernel<ConvolutionKernel>};
}

}  // namespace meki::ops
