#include "runtime/kernels/simd/avx512.h"

#include "runtime/kernels/simd/algorithms.h"

namespace meki {

constinit const Simd kAvx512Vnni = make_path("avx512vnni");

}  // namespace meki
