#include "runtime/kernels/simd/algorithms.h"
#include "runtime/kernels/simd/neon.h"

namespace meki {

constinit const Simd kNeonDotprod = make_path("neon-dotprod");

}  // namespace meki
