#pragma once

// The algorithms over one instruction set's vectors (common.h), as a path.

#include "runtime/kernels/simd/attention.h"
#include "runtime/kernels/simd/linear.h"

namespace meki {
namespace {

// By WeightType.
constexpr Simd::Panel kPanels[] = {nullptr,
                                   panel<WeightType::int8>,
                                   panel<WeightType::int4>,
                                   panel<WeightType::int4_minimum>,
                                   panel<WeightType::int8_minimum>,
                                   panel<WeightType::int8_16>};

constexpr Simd make_path(std::string_view name, const Simd::Panel (&panels)[kWeightTypes] = kPanels) {
  return {name,
          {scores_float<float>, scores_float<uint16_t>, scores_int8, scores_int4},
          {values_float<float>, values_float<uint16_t>, values_int8, values_int4},
          rotate,
          hadamard,
          quantize_head,
          softmax,
          swiglu,
          geglu,
          quantize,
          {panels[0], panels[1], panels[2], panels[3], panels[4], panels[5]}};
}

}  // namespace
}  // namespace meki
