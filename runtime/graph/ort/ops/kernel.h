#pragma once

// What an operator of ours is written against: its attributes and constants when a session is made, its inputs and
// outputs when it runs. A failure is an exception; ops/operators.cc makes it a status for ONNX Runtime.

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <vector>

#include "runtime/base/parallel.h"
#include "runtime/graph/ort/api.h"
#include "runtime/kernels/experts.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/kernels/linear.h"

namespace meki::ops {

// A failed check becomes an error status of the operator, with this text.
inline void require(bool valid, const char* what) {
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

Shape shape_of(const ort::Api& api, const ort::Value* value);
ort::ElementCode type_of(const ort::Api& api, const ort::Value* value);
void* data_of(const ort::Api& api, const ort::Value* value);

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
    require(made != nullptr, "an output is missing");
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
  ort::ElementCode type = ort::kFloat;

  // A vector of `count` floats.
  const float* floats(size_t count) const {
    require(shape.rank == 1 && shape.elements() == count, "a vector of weights has another length");
    return static_cast<const float*>(data);
  }
  // A packed matrix of so many rows.
  PackedWeight packed(size_t outputs, WeightType weight_type) const {
    const Part part{weight_type, outputs};
    return packed(std::span(&part, 1)).front();
  }
  // Packed matrices, one below the other: what is theirs of [bytes].
  struct Part {
    WeightType type;
    size_t outputs;
  };
  std::vector<PackedWeight> packed(std::span<const Part> parts) const {
    require(shape.rank == 1, "a packed weight has another shape");
    size_t column_bytes = 0;  // of 32 columns of all
    for (const Part& part : parts) column_bytes += (part.outputs + 15) / 16 * block_bytes(part.type);
    require(column_bytes > 0, "a packed weight has another shape");
    const size_t blocks = shape.elements() / column_bytes;
    require(blocks > 0 && shape.elements() % column_bytes == 0, "a packed weight has another shape");
    std::vector<PackedWeight> weights;
    const auto* at = static_cast<const std::byte*>(data);
    for (const Part& part : parts) {
      weights.push_back({at, part.outputs, blocks * 32, part.type});
      at += weights.back().bytes();
    }
    return weights;
  }
  // The matrices of `count` experts, of so many rows each: float32 or packed. The number of columns is theirs.
  ExpertMatrices experts(size_t count, size_t outputs, WeightType weight_type) const {
    const bool floats = weight_type == WeightType::float32;
    require(type == (floats ? ort::kFloat : ort::kUint8), "the type of the experts is another than said");
    const auto* const matrices = static_cast<const std::byte*>(data);
    if (!floats) {
      require(outputs % 16 == 0, "a packed expert has no multiple of 16 rows");
      return {matrices, outputs, packed(count * outputs, weight_type).inputs, weight_type};
    }
    require(shape.rank == 2 && shape.last() > 0 && static_cast<size_t>(shape.sizes[0]) == count * outputs,
            "the matrices of the experts have another shape");
    return {matrices, outputs, static_cast<size_t>(shape.last()), weight_type};
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
  // An attribute of 0 to count - 1; 0 if it is absent.
  int64_t choice(const char* name, int64_t count) const {
    if (!has_number(name)) return 0;
    const int64_t value = integer(name);
    require(value >= 0 && value < count, "an attribute is not one of its choices");
    return value;
  }
  // A packed type, by its number.
  WeightType packed_type(const char* name) const {
    const WeightType type = weight_type(name);
    require(type != WeightType::float32, "a packed weight has no packed type");
    return type;
  }
  WeightType weight_type(const char* name) const {
    const int64_t value = integer(name);
    require(value >= 0 && value < static_cast<int64_t>(kWeightTypes), "a weight has a type that is not known");
    return static_cast<WeightType>(value);
  }
  float number(const char* name) const {
    float value = 0;
    api_.check(api_.KernelInfoGetAttribute_float(info_, name, &value));
    return value;
  }
  // The same of one that may be absent.
  float number(const char* name, float absent) const { return has_number(name) ? number(name) : absent; }
  // Whether an optional input is there: one that is left out before a later one has an empty name.
  bool has_input(size_t index) const {
    size_t count = 0;
    api_.check(api_.KernelInfo_GetInputCount(info_, &count));
    if (index >= count) return false;
    size_t size = 0;  // of the name with its end; without a place for it, only this is told
    api_.check(api_.KernelInfo_GetInputName(info_, index, nullptr, &size));
    return size > 1;
  }
  size_t outputs() const {
    size_t count = 0;
    api_.check(api_.KernelInfo_GetOutputCount(info_, &count));
    return count;
  }
  Constant constant(size_t index) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    api_.check(api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    require(is_constant != 0 && value != nullptr, "a weight or table is not a constant");
    return {data_of(api_, value), shape_of(api_, value), type_of(api_, value)};
  }

 private:
  // Whether there is an attribute of this name, be it an integer or a float: one of the wrong type is not absent.
  bool has_number(const char* name) const {
    const auto given = [this](ort::Status* status) {
      if (status != nullptr) api_.ReleaseStatus(status);
      return status == nullptr;
    };
    int64_t integer = 0;
    float real = 0;
    return given(api_.KernelInfoGetAttribute_int64(info_, name, &integer)) ||
           given(api_.KernelInfoGetAttribute_float(info_, name, &real));
  }
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

template <class K>
std::unique_ptr<Kernel> make_kernel(const Definition& node, KvType kv_type) {
  return std::make_unique<K>(node, kv_type);
}

// A kind of operator. Its first `required_inputs` inputs are always there.
struct Kind {
  const char* name;
  size_t required_inputs;
  std::vector<ort::ElementCode> inputs;
  std::vector<ort::ElementCode> outputs;
  std::unique_ptr<Kernel> (*make)(const Definition& node, KvType kv_type);
};

// A file each; operators.cc lists them.
Kind attention();
Kind convolution();
Kind embedding();
Kind experts();
Kind injection();
Kind linear();

}  // namespace meki::ops
