#include "runtime/kernels/simd/avx2.h"

#include "runtime/kernels/simd/algorithms.h"

namespace meki {

constinit const Simd kAvx2 = make_path("avx2");

}  // namespace meki
