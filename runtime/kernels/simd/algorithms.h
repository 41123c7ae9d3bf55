#pragma once

// The algorithms over one instruction set's vectors (common.h), as a path.

#include "runtime/kernels/simd/attention.h"
#include "runtime/kernels/simd/linear.h"

namespace meki {
namespace {

constexpr Simd make_path(std::string_view name, Simd::Panel panel4 = panel<4>, Simd::Panel panel8 = panel<8>) {
  return {name,
          {scores_float<float>, scores_float<uint16_t>, scores_int8, scores_int4},
          {values_float<float>, values_float<uint16_t>, values_int8, values_int4},
          softmax,
          swiglu,
          quantize,
          panel4,
          panel8};
}

}  // namespace
}  // namespace meki
