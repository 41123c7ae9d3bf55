#include "graph/ort_ops.h"

#include <array>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "kernels/injection.h"
#include "kernels/linear.h"
#include "kernels/thread_pool.h"

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

// Inputs, outputs and threads of one operator call.
class Call {
 public:
  Call(const ort::Api& api, ort::KernelContext* context, const Parallel& parallel)
      : api_(api), context_(context), parallel_(parallel) {}

  size_t input_count() const {
    size_t count = 0;
    api_.check(api_.KernelContext_GetInputCount(context_, &count));
    return count;
  }
  template <class T>
  const T* input(size_t index) const {
    return static_cast<const T*>(data(const_cast<ort::Value*>(value(index))));
  }
  // Whether an optional input is there.
  bool has_input(size_t index) const { return index < input_count() && value(index) != nullptr; }
  // An input of a fixed number of floats.
  const float* floats(size_t index, size_t count) const {
    require(input_bytes(index) == count * sizeof(float), "a gain or residual has another shape");
    return input<float>(index);
  }
  size_t input_bytes(size_t index) const {
    size_t bytes = 0;
    api_.check(api_.GetTensorSizeInBytes(value(index), &bytes));
    return bytes;
  }
  Shape input_shape(size_t index) const {
    ort::TensorShape* info = nullptr;
    api_.check(api_.GetTensorTypeAndShape(value(index), &info));
    const std::unique_ptr<ort::TensorShape, void (*)(ort::TensorShape*)> owner(info,
                                                                               api_.ReleaseTensorTypeAndShapeInfo);
    Shape shape;
    api_.check(api_.GetDimensionsCount(info, &shape.rank));
    require(shape.rank >= 1 && shape.rank <= shape.sizes.size(), "an input has a rank outside 1 to 4");
    api_.check(api_.GetDimensions(info, shape.sizes.data(), shape.rank));
    return shape;
  }
  template <class T>
  T* output(size_t index, const Shape& shape) const {
    ort::Value* made = nullptr;
    api_.check(api_.KernelContext_GetOutput(context_, index, shape.sizes.data(), shape.rank, &made));
    return static_cast<T*>(data(made));
  }
  const Parallel& parallel() const { return parallel_; }

 private:
  const ort::Value* value(size_t index) const {
    const ort::Value* value = nullptr;
    api_.check(api_.KernelContext_GetInput(context_, index, &value));
    return value;
  }
  void* data(ort::Value* value) const {
    void* data = nullptr;
    api_.check(api_.GetTensorMutableData(value, &data));
    return data;
  }

  const ort::Api& api_;
  ort::KernelContext* context_;
  const Parallel& parallel_;
};

// A node's attributes.
class Attributes {
 public:
  Attributes(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}
  size_t positive(const char* name) const {
    int64_t value = 0;
    api_.check(api_.KernelInfoGetAttribute_int64(info_, name, &value));
    require(value > 0 && value <= INT32_MAX, "an attribute is not a positive integer");
    return static_cast<size_t>(value);
  }
  bool flag(const char* name) const {
    int64_t value = 0;
    api_.check(api_.KernelInfoGetAttribute_int64(info_, name, &value));
    require(value == 0 || value == 1, "an attribute is neither 0 nor 1");
    return value == 1;
  }
  float number(const char* name) const {
    float value = 0;
    api_.check(api_.KernelInfoGetAttribute_float(info_, name, &value));
    return value;
  }

 private:
  const ort::Api& api_;
  const ort::KernelInfo* info_;
};

// A node, ready to be called. Immutable: one session may run in several threads.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) const = 0;
};

class AttentionKernel final : public Kernel {
 public:
  AttentionKernel(const Attributes& attributes, KvType kv_type)
      : kv_type_(kv_type),
        heads_(attributes.positive("heads")),
        kv_heads_(attributes.positive("kv_heads")),
        epsilon_(attributes.number("epsilon")) {
    require(heads_ % kv_heads_ == 0, "heads is not a multiple of kv_heads");
  }

  void compute(const Call& call) const override {
    const Shape qkv = call.input_shape(0);
    const size_t slices = heads_ + 2 * kv_heads_;
    require(qkv.rank == 3 && qkv.sizes[0] == 1 && qkv.sizes[1] > 0 && static_cast<size_t>(qkv.last()) % slices == 0,
            "qkv is not [1, tokens, (heads + 2 * kv_heads) * head_dim]");
    const size_t head_dim = static_cast<size_t>(qkv.last()) / slices;
    const KvLayout layout(kv_type_, kv_heads_, head_dim);
    const auto tokens = static_cast<size_t>(qkv.sizes[1]);
    const int32_t total = *call.input<int32_t>(2);
    require(total >= 0 && static_cast<size_t>(total) >= tokens, "the sequence is shorter than this step");
    const auto length = static_cast<size_t>(total);
    const Shape blocks = call.input_shape(1);
    require(blocks.rank == 3 && static_cast<size_t>(blocks.sizes[1]) == kv_heads_ &&
                static_cast<size_t>(blocks.sizes[2]) == layout.block_bytes(),
            "the KV cache has other heads or another head_dim");
    require(length <= static_cast<size_t>(blocks.sizes[0]) * KvLayout::kBlock,
            "the sequence is longer than the KV cache");
    for (const size_t table : {3, 4}) {
      require(call.input_bytes(table) / sizeof(float) / (head_dim / 2) >= length,
              "the sequence is longer than the rotary tables");
    }
    const bool norm = call.has_input(5);
    auto* const cache = call.output<std::byte>(1, blocks);
    require(cache == call.input<std::byte>(1), "past and present are not the same memory");
    const AttentionStep step{
        .heads = heads_,
        .tokens = tokens,
        .past = length - tokens,
        .qkv = call.input<float>(0),
        .cos = call.input<float>(3),
        .sin = call.input<float>(4),
        .q_gain = norm ? call.floats(5, head_dim) : nullptr,
        .k_gain = norm ? call.floats(6, head_dim) : nullptr,
        .epsilon = epsilon_,
        .cache = cache,
        .out = call.output<float>(0, {{1, qkv.sizes[1], static_cast<int64_t>(heads_ * head_dim)}, 3}),
    };
    attention(simd(), layout, step, call.parallel());
  }

 private:
  KvType kv_type_;
  size_t heads_;
  size_t kv_heads_;
  float epsilon_;
};

int checked_bits(size_t bits) {
  require(bits == 4 || bits == 8, "bits is neither 4 nor 8");
  return static_cast<int>(bits);
}

// The packed weight in an input.
PackedWeight packed_weight(const Call& call, size_t index, size_t outputs, int bits) {
  const Shape shape = call.input_shape(index);
  require(shape.rank == 3, "a packed weight is not of rank 3");
  const PackedWeight weight{call.input<std::byte>(index), outputs, static_cast<size_t>(shape.sizes[1]) * 32, bits};
  require(call.input_bytes(index) == weight.bytes(), "a packed weight has another shape");
  return weight;
}

class LinearKernel final : public Kernel {
 public:
  explicit LinearKernel(const Attributes& attributes)
      : outputs_(attributes.positive("outputs")),
        bits_(checked_bits(attributes.positive("bits"))),
        swiglu_(attributes.flag("swiglu")),
        epsilon_(attributes.number("epsilon")) {}

  // Inputs: x, weight, gain (optional), residual (optional).
  void compute(const Call& call) const override {
    Shape shape = call.input_shape(0);
    const PackedWeight weight = packed_weight(call, 1, outputs_, bits_);
    LinearInput input{.x = call.input<float>(0), .stride = static_cast<size_t>(shape.last()), .epsilon = epsilon_};
    require(input.stride == (swiglu_ ? 2 : 1) * weight.inputs, "x and the weight have different widths");
    const size_t tokens = shape.elements() / input.stride;
    if (swiglu_) input.kind = LinearInput::Kind::swiglu;
    if (call.has_input(2)) {
      input.kind = LinearInput::Kind::norm;
      input.gain = call.floats(2, weight.inputs);
    }
    const float* const residual = call.has_input(3) ? call.floats(3, tokens * outputs_) : nullptr;
    shape.sizes[shape.rank - 1] = static_cast<int64_t>(outputs_);
    linear(simd(), weight, input, residual, tokens, call.output<float>(0, shape), call.parallel());
  }

 private:
  size_t outputs_;
  int bits_;
  bool swiglu_;
  float epsilon_;
};

class InjectionKernel final : public Kernel {
 public:
  explicit InjectionKernel(const Attributes& attributes)
      : bits_(checked_bits(attributes.positive("bits"))), epsilon_(attributes.number("epsilon")) {}

  // Inputs: x, attended, rows, gate, out_proj, ffn_gain, out_gain.
  void compute(const Call& call) const override {
    const Shape x = call.input_shape(0);
    const Shape rows = call.input_shape(2);
    const auto hidden = static_cast<size_t>(x.last());
    const auto memory_dim = static_cast<size_t>(rows.last());
    const size_t tokens = x.elements() / hidden;
    InjectionStep step{.tokens = tokens,
                       .attended = call.floats(1, tokens * hidden),
                       .x = call.input<float>(0),
                       .rows = call.floats(2, tokens * memory_dim),
                       .gate = packed_weight(call, 3, memory_dim, bits_),
                       .out_proj = packed_weight(call, 4, hidden, bits_),
                       .ffn_gain = call.floats(5, hidden),
                       .out_gain = call.floats(6, hidden),
                       .epsilon = epsilon_};
    require(step.gate.inputs == hidden && step.out_proj.inputs == memory_dim,
            "the projections of the memory have other widths than x and the rows");
    step.out = call.output<float>(0, x);
    inject(simd(), step, call.parallel());
  }

 private:
  int bits_;
  float epsilon_;
};

class EmbeddingKernel final : public Kernel {
 public:
  explicit EmbeddingKernel(const Attributes& attributes)
      : outputs_(attributes.positive("outputs")), bits_(checked_bits(attributes.positive("bits"))) {}

  void compute(const Call& call) const override {
    const Shape ids = call.input_shape(0);
    require(ids.rank == 2, "ids are not [1, tokens]");
    const PackedWeight weight = packed_weight(call, 1, outputs_, bits_);
    const auto* const token_ids = call.input<int64_t>(0);
    for (size_t t = 0; t < ids.elements(); ++t) {
      require(token_ids[t] >= 0 && static_cast<size_t>(token_ids[t]) < outputs_, "a token id is out of the vocabulary");
    }
    const auto inputs = static_cast<int64_t>(weight.inputs);
    embedding(weight, token_ids, ids.elements(), call.output<float>(0, {{ids.sizes[0], ids.sizes[1], inputs}, 3}));
  }

 private:
  size_t outputs_;
  int bits_;
};

// A kind of operator. ONNX Runtime calls back with what it was given, so everything hangs on this object.
struct Operator : ort::CustomOp {
  const char* name = nullptr;
  std::vector<ort::ElementCode> inputs;
  size_t required_inputs = 0;
  std::vector<ort::ElementCode> outputs;
  std::unique_ptr<Kernel> (*make)(const Attributes&, KvType) = nullptr;
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
    make = [](const Attributes& attributes, KvType type) -> std::unique_ptr<Kernel> {
      if constexpr (std::is_constructible_v<K, const Attributes&, KvType>) {
        return std::make_unique<K>(attributes, type);
      } else {
        return std::make_unique<K>(attributes);
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
    return guarded(kind, [&] { *kernel = new Node{kind, kind.make(Attributes(*kind.api, info), kind.kv_type)}; });
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
    operators[3].describe<InjectionKernel>("Injection", 7, {kFloat, kFloat, kFloat, kUint8, kUint8, kFloat, kFloat},
                                           {kFloat});
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
