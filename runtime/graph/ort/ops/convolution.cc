// meki.ShortConvolution: docs/package-format.md, "Operators".

#include "runtime/kernels/convolution.h"

#include "runtime/graph/ort/ops/kernel.h"

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
    require(call.input_shape(2).elements() == 1, "total_sequence_length is not one integer");
    const int32_t total = *call.input<int32_t>(2);
    require(total >= x.sizes[1], "the sequence is shorter than this step");
    const Shape cache = call.input_shape(1);
    require(cache.rank == 2 && static_cast<size_t>(cache.last()) == args_.channels * convolution_bytes(args_.kv_type),
            "the cache is not [positions, bytes of the channels]");
    require(total <= cache.sizes[0], "the sequence is longer than the cache");
    ConvolutionArgs args = args_;
    args.tokens = static_cast<size_t>(x.sizes[1]);
    args.past = static_cast<size_t>(total) - args.tokens;
    args.x = call.input<float>(0);
    args.cache = call.output<std::byte>(1, cache);
    require(args.cache == call.input<std::byte>(1), "past and present are not the same memory");
    args.out = call.output<float>(0, x);
    convolve(args, call.parallel());
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
