#include "runtime/graph/ort/ops.h"

#include <array>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/base/thread_pool.h"
#include "runtime/kernels/attention.h"
#include "runtime/kernels/injection.h"
#include "runtime/kernels/linear.h"

namespace meki {
namespace {

// A failed check becomes an error status of the operator, with this text.
void require(bool valid, const char* what) {
  if (!valid) throw std::runtime_error(what);
}

struct Shape {
  std::array<int64_t, 4> sizes{};
  size_t rank = 0;

  int64_t last() const { return sizes[rank - 1]; }
  size_t elements() const {
    return static_cast<size_t>(std::accumulate(sizes.begin(), sizes.begin() + static_cast<std::ptrdiff_t>(rank),
                                               int64_t{1}, std::multiplies<>()));
  }
};

Shape shape_of(const ort::Api& api, const ort::Value* value) {
  ort::TensorShape* info = nullptr;
  api.check(api.GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<ort::TensorShape, void (*)(ort::TensorShape*)> owner(info, api.ReleaseTensorTypeAndShapeInfo);
  Shape shape;
  api.check(api.GetDimensionsCount(info, &shape.rank));
  require(shape.rank <= shape.sizes.size(), "an input has more than 4 dimensions");
  api.check(api.GetDimensions(info, shape.sizes.data(), shape.rank));
  return shape;
}

void* data_of(const ort::Api& api, const ort::Value* value) {
  void* data = nullptr;
  api.check(api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  return data;
}

// Inputs, outputs and threads of one operator call.
class Call {
 public:
  Call(const ort::Api& api, ort::KernelContext* context, const Parallel& parallel)
      : api_(api), context_(context), parallel_(parallel) {}

  template <class T>
  const T* input(size_t index) const {
    return static_cast<const T*>(data_of(api_, value(index)));
  }
  Shape input_shape(size_t index) const { return shape_of(api_, value(index)); }
  template <class T>
  T* output(size_t index, const Shape& shape) const {
    ort::Value* made = nullptr;
    api_.check(api_.KernelContext_GetOutput(context_, index, shape.sizes.data(), shape.rank, &made));
    return static_cast<T*>(data_of(api_, made));
  }
  const Parallel& parallel() const { return parallel_; }

 private:
  const ort::Value* value(size_t index) const {
    const ort::Value* value = nullptr;
    api_.check(api_.KernelContext_GetInput(context_, index, &value));
    return value;
  }

  const ort::Api& api_;
  ort::KernelContext* context_;
  const Parallel& parallel_;
};

// A constant input: in memory, or in the mapped weights, for the life of the session.
struct Constant {
  const void* data = nullptr;
  Shape shape;

  // A vector of `count` floats.
  const float* floats(size_t count) const {
    require(shape.rank == 1 && shape.elements() == count, "a gain has another length");
    return static_cast<const float*>(data);
  }
  // A packed matrix of so many rows.
  PackedWeight packed(size_t outputs, int bits) const {
    const PackedWeight weight{static_cast<const std::byte*>(data), outputs, static_cast<size_t>(shape.sizes[1]) * 32,
                              bits};
    require(shape.rank == 3 && weight.inputs > 0 && shape.elements() == weight.bytes(),
            "a packed weight has another shape");
    return weight;
  }
};

// A node's attributes and constant inputs.
class Definition {
 public:
  Definition(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}
  size_t positive(const char* name) const {
    const int64_t value = integer(name);
    require(value > 0 && value <= INT32_MAX, "an attribute is not a positive integer");
    return static_cast<size_t>(value);
  }
  size_t index(const char* name) const {
    const int64_t value = integer(name);
    require(value >= 0 && value <= INT32_MAX, "an attribute is negative");
    return static_cast<size_t>(value);
  }
  bool flag(const char* name) const {
    const int64_t value = integer(name);
    require(value == 0 || value == 1, "an attribute is neither 0 nor 1");
    return value == 1;
  }
  int bits() const {
    const int64_t value = integer("bits");
    require(value == 4 || value == 8, "bits is neither 4 nor 8");
    return static_cast<int>(value);
  }
  float number(const char* name) const {
    float value = 0;
    api_.check(api_.KernelInfoGetAttribute_float(info_, name, &value));
    return value;
  }
  // Whether an optional input is there: one that is left out before a later one has an empty name.
  bool has_input(size_t index) const {
    size_t count = 0;
    api_.check(api_.KernelInfo_GetInputCount(info_, &count));
    if (index >= count) return false;
    size_t size = 0;  // of the name with its end; without a place for it, only this is told
    api_.check(api_.KernelInfo_GetInputName(info_, index, nullptr, &size));
    return size > 1;
  }
  Constant constant(size_t index) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    api_.check(api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    require(is_constant != 0 && value != nullptr, "a weight, gain or table is not a constant");
    return {data_of(api_, value), shape_of(api_, value)};
  }

 private:
  int64_t integer(const char* name) const {
    int64_t value = 0;
    api_.check(api_.KernelInfoGetAttribute_int64(info_, name, &value));
    return value;
  }

  const ort::Api& api_;
  const ort::KernelInfo* info_;
};

// A node, ready to be called. Immutable: one session may run in several threads.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) const = 0;
};

// Inputs: qkv, past, total_sequence_length, cos, sin, and with QK-norm q_gain, k_gain.
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
    require(node.has_input(5) == node.has_input(6), "q_gain and k_gain come together or not at all");
    if (!node.has_input(5)) return;
    q_gain_ = node.constant(5).floats(layout_.head_dim);
    k_gain_ = node.constant(6).floats(layout_.head_dim);
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
        .cos = static_cast<const float*>(cos_.data),
        .sin = static_cast<const float*>(sin_.data),
        .q_norm_weight = q_gain_,
        .k_norm_weight = k_gain_,
        .epsilon = epsilon_,
        .cache = cache,
        .out = call.output<float>(0, {{1, qkv.sizes[1], static_cast<int64_t>(heads_ * head_dim)}, 3}),
    };
    attention(simd(), layout_, args, call.parallel());
  }

 private:
  size_t heads_;
  size_t kv_heads_;
  float epsilon_;
  Constant cos_;
  Constant sin_;
  KvLayout layout_;
  const float* q_gain_ = nullptr;
  const float* k_gain_ = nullptr;
};

// Inputs: x, weight, gain (optional), residual (optional).
class LinearKernel final : public Kernel {
 public:
  explicit LinearKernel(const Definition& node)
      : weight_(node.constant(1).packed(node.positive("outputs"), node.bits())), has_residual_(node.has_input(3)) {
    input_.epsilon = node.number("epsilon");
    if (node.flag("swiglu")) input_.kind = LinearInput::Kind::swiglu;
    if (node.has_input(2)) {
      require(input_.kind == LinearInput::Kind::plain, "both a gain and swiglu are asked for");
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

// Inputs: ids, weight.
class EmbeddingKernel final : public Kernel {
 public:
  explicit EmbeddingKernel(const Definition& node)
      : weight_(node.constant(1).packed(node.positive("outputs"), node.bits())) {}

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

// Inputs: x, projected, rows, out_proj, out_gain.
class InjectionKernel final : public Kernel {
 public:
  explicit InjectionKernel(const Definition& node) : layer_(node.index("layer")), epsilon_(node.number("epsilon")) {
    const Constant gain = node.constant(4);
    out_gain_ = gain.floats(gain.shape.elements());
    out_proj_ = node.constant(3).packed(gain.shape.elements(), node.bits());
  }

  void compute(const Call& call) const override {
    const Shape x = call.input_shape(0);
    const Shape projected = call.input_shape(1);
    const Shape rows = call.input_shape(2);
    const size_t memory_dim = out_proj_.inputs;
    require(x.rank == 3 && x.sizes[0] == 1 && static_cast<size_t>(x.last()) == out_proj_.outputs,
            "x is not [1, tokens, hidden]");
    const auto tokens = static_cast<size_t>(x.sizes[1]);
    require(projected.rank == 3 && projected.sizes[0] == 1 && projected.sizes[1] == x.sizes[1] &&
                static_cast<size_t>(projected.last()) >= memory_dim,
            "the gate is not [1, tokens, memory_dim or more]");
    require(rows.rank == 3 && static_cast<size_t>(rows.sizes[0]) > layer_ && rows.sizes[1] == x.sizes[1] &&
                static_cast<size_t>(rows.last()) == memory_dim,
            "rows are not [more layers than `layer`, tokens, memory_dim]");
    const auto stride = static_cast<size_t>(projected.last());
    const InjectionStep step{.tokens = tokens,
                             .x = call.input<float>(0),
                             .gate = call.input<float>(1) + (stride - memory_dim),
                             .gate_stride = stride,
                             .rows = call.input<float>(2) + layer_ * tokens * memory_dim,
                             .out_proj = out_proj_,
                             .out_gain = out_gain_,
                             .epsilon = epsilon_,
                             .out = call.output<float>(0, x)};
    inject(simd(), step, call.parallel());
  }

 private:
  size_t layer_;
  float epsilon_;
  const float* out_gain_ = nullptr;
  PackedWeight out_proj_;
};

// A kind of operator. ONNX Runtime calls back with what it was given, so everything hangs on this object.
struct Operator : ort::CustomOp {
  const char* name = nullptr;
  std::vector<ort::ElementCode> inputs;
  size_t required_inputs = 0;
  std::vector<ort::ElementCode> outputs;
  std::unique_ptr<Kernel> (*make)(const Definition&, KvType) = nullptr;
  const ort::Api* api = nullptr;
  KvType kv_type = KvType::int8;
  Parallel parallel;

  template <class K>
  void describe(const char* name_, size_t required, std::vector<ort::ElementCode> inputs_,
                std::vector<ort::ElementCode> outputs_) {
    name = name_;
    required_inputs = required;
    inputs = std::move(inputs_);
    outputs = std::move(outputs_);
    make = [](const Definition& node, KvType type) -> std::unique_ptr<Kernel> {
      if constexpr (std::is_constructible_v<K, const Definition&, KvType>) {
        return std::make_unique<K>(node, type);
      } else {
        return std::make_unique<K>(node);
      }
    };
  }
};

const Operator& self(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

struct Node {
  const Operator& kind;
  std::unique_ptr<Kernel> kernel;
};

// Runs `work`; an exception becomes a status.
template <class Work>
ort::Status* guarded(const Operator& kind, Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return kind.api->CreateStatus(ort::kFail, (std::string("meki.") + kind.name + ": " + error.what()).c_str());
  }
}

void set_callbacks(Operator& table) {
  table.GetName = [](const ort::CustomOp* op) { return self(op).name; };
  table.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };  // CPU
  table.GetInputType = [](const ort::CustomOp* op, size_t index) { return self(op).inputs[index]; };
  table.GetInputTypeCount = [](const ort::CustomOp* op) { return self(op).inputs.size(); };
  table.GetOutputType = [](const ort::CustomOp* op, size_t index) { return self(op).outputs[index]; };
  table.GetOutputTypeCount = [](const ort::CustomOp* op) { return self(op).outputs.size(); };
  table.GetInputCharacteristic = [](const ort::CustomOp* op, size_t index) {
    return index < self(op).required_inputs ? ort::kRequired : ort::kOptional;
  };
  table.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  table.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kMemoryDefault; };
  table.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  table.GetEndVersion = [](const ort::CustomOp*) { return 1; };
  table.CreateKernelV2 = [](const ort::CustomOp* op, const void*, const ort::KernelInfo* info, void** kernel) {
    const Operator& kind = self(op);
    return guarded(kind, [&] { *kernel = new Node{kind, kind.make(Definition(*kind.api, info), kind.kv_type)}; });
  };
  table.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    const auto& node = *static_cast<const Node*>(kernel);
    return guarded(node.kind, [&] { node.kernel->compute(Call(*node.kind.api, context, node.kind.parallel)); });
  };
  table.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
}

}  // namespace

struct OrtOperators::Domain {
  const ort::Api& api;
  ThreadPool pool;
  std::array<Operator, 4> operators;
  ort::CustomOpDomain* handle = nullptr;

  Domain(const ort::Api& api_, KvType kv_type, size_t threads) : api(api_), pool(threads) {
    using ort::kFloat, ort::kUint8, ort::kInt32, ort::kInt64;
    operators[0].describe<AttentionKernel>("Attention", 5, {kFloat, kUint8, kInt32, kFloat, kFloat, kFloat, kFloat},
                                           {kFloat, kUint8});
    operators[1].describe<LinearKernel>("Linear", 2, {kFloat, kUint8, kFloat, kFloat}, {kFloat});
    operators[2].describe<EmbeddingKernel>("Embedding", 2, {kInt64, kUint8}, {kFloat});
    operators[3].describe<InjectionKernel>("Injection", 5, {kFloat, kFloat, kFloat, kUint8, kFloat}, {kFloat});
    for (Operator& op : operators) {
      op.api = &api;
      op.kv_type = kv_type;
      op.parallel = pool.parallel();
      set_callbacks(op);
    }
  }
  ~Domain() {
    if (handle != nullptr) api.ReleaseCustomOpDomain(handle);
  }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
};

OrtOperators::OrtOperators(const ort::Api& api, KvType kv_type, size_t threads)
    : domain_(std::make_unique<Domain>(api, kv_type, threads)) {
  api.check(api.CreateCustomOpDomain("meki", &domain_->handle));
  for (const Operator& op : domain_->operators) api.check(api.CustomOpDomain_Add(domain_->handle, &op));
}

OrtOperators::~OrtOperators() = default;

void OrtOperators::add_to(ort::SessionOptions* options) const {
  domain_->api.check(domain_->api.AddCustomOpDomain(options, domain_->handle));
}

}  // namespace meki
