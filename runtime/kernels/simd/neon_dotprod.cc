// clang-format off: the vectors, then the algorithms over them
#include "runtime/kernels/simd/neon.h"
#include "runtime/kernels/simd/algorithms.h"
// clang-format on

namespace meki {

constinit const Simd kNeonDotprod = make_path("neon-dotprod");

}  // namespace meki
