#include "runtime/graph/ort/ops/kernel.h"

namespace meki::ops {

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

}  // namespace meki::ops
