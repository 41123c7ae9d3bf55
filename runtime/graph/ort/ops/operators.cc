#include "runtime/graph/ort/ops/operators.h"

#include <array>
#include <exception>
#include <string>

#include "runtime/base/thread_pool.h"
#include "runtime/graph/ort/ops/kernel.h"

namespace meki {
namespace {

using ops::Call, ops::Definition, ops::Kernel;

// ONNX Runtime calls back with what it was given, so everything hangs on this object.
struct Operator : ort::CustomOp {
  ops::Kind kind;
  const ort::Api* api = nullptr;
  KvType kv_type = KvType::int8;
  Parallel parallel;
};

const Operator& self(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

struct Instance {
  const Operator& op;
  std::unique_ptr<Kernel> kernel;
};

// Runs `work`; an exception becomes a status.
template <class Work>
ort::Status* guarded(const Operator& op, Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return op.api->CreateStatus(ort::kFail, (std::string("meki.") + op.kind.name + ": " + error.what()).c_str());
  }
}

void set_callbacks(Operator& table) {
  table.GetName = [](const ort::CustomOp* op) { return self(op).kind.name; };
  table.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };  // CPU
  table.GetInputType = [](const ort::CustomOp* op, size_t index) { return self(op).kind.inputs[index]; };
  table.GetInputTypeCount = [](const ort::CustomOp* op) { return self(op).kind.inputs.size(); };
  table.GetOutputType = [](const ort::CustomOp* op, size_t index) { return self(op).kind.outputs[index]; };
  table.GetOutputTypeCount = [](const ort::CustomOp* op) { return self(op).kind.outputs.size(); };
  table.GetInputCharacteristic = [](const ort::CustomOp* op, size_t index) {
    return index < self(op).kind.required_inputs ? ort::kRequired : ort::kOptional;
  };
  table.GetOutputCharacteristic = [](const ort::CustomOp*, size_t index) {
    return index == 0 ? ort::kRequired : ort::kOptional;  // a state, which Attention over another layer's does not make
  };
  table.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kMemoryDefault; };
  table.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  table.GetEndVersion = [](const ort::CustomOp*) { return 1; };
  table.CreateKernelV2 = [](const ort::CustomOp* op, const void*, const ort::KernelInfo* info, void** kernel) {
    const Operator& it = self(op);
    return guarded(it, [&] { *kernel = new Instance{it, it.kind.make(Definition(*it.api, info), it.kv_type)}; });
  };
  table.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    const auto& it = *static_cast<const Instance*>(kernel);
    return guarded(it.op, [&] { it.kernel->compute(Call(*it.op.api, context, it.op.parallel)); });
  };
  table.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
}

}  // namespace

struct OrtOperators::Domain {
  const ort::Api& api;
  ThreadPool pool;
  std::array<Operator, 6> operators;
  ort::CustomOpDomain* handle = nullptr;

  Domain(const ort::Api& api_, KvType kv_type, size_t threads) : api(api_), pool(threads) {
    std::array kinds = {ops::attention(), ops::convolution(), ops::embedding(),
                        ops::experts(),   ops::injection(),   ops::linear()};
    for (size_t index = 0; index < operators.size(); ++index) {
      Operator& op = operators[index];
      op.kind = std::move(kinds[index]);
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

Parallel OrtOperators::parallel() const { return domain_->pool.parallel(); }

void OrtOperators::add_to(ort::SessionOptions* options) const {
  domain_->api.check(domain_->api.AddCustomOpDomain(options, domain_->handle));
}

}  // namespace meki
