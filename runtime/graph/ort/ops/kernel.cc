#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {

namespace {

using Info = std::unique_ptr<ort::TensorShape, void (*)(ort::TensorShape*)>;

Info info_of(const ort::Api& api, const ort::Value* value) {
  ort::TensorShape* info = nullptr;
  api.check(api.GetTensorTypeAndShape(value, &info));
  return {info, api.ReleaseTensorTypeAndShapeInfo};
}

}  // namespace

Shape shape_of(const ort::Api& api, const ort::Value* value) {
  const Info info = info_of(api, value);
  Shape shape;
  api.check(api.GetDimensionsCount(info.get(), &shape.rank));
  require(shape.rank <= shape.sizes.size(), "an input has more than 4 dimensions");
  api.check(api.GetDimensions(info.get(), shape.sizes.data(), shape.rank));
  return shape;
}

ort::ElementCode type_of(const ort::Api& api, const ort::Value* value) {
  ort::ElementCode type = ort::kAny;
  api.check(api.GetTensorElementType(info_of(api, value).get(), &type));
  return type;
}

void* data_of(const ort::Api& api, const ort::Value* value) {
  void* data = nullptr;
  api.check(api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  return data;
}

}  // namespace meki::ops
