#pragma once

#include "runtime/kernels/simd/simd.h"

namespace meki {

// How many bytes ahead of what it streams a kernel has to ask memory for; 0: the hardware does it, and better. Measured
// (docs/architecture.md, "Attention"): Intel's streams run half as fast again if they are asked for, AMD's slower.
extern const size_t kFetchAhead;

// The paths that are compiled in; simd_paths() says which of them may run. A path of an architecture that this build is
// not for does not exist.
extern const Simd kPortable;
extern const Simd kAvx512Vnni;   // x86-64: AVX-512 F, BW, DQ, VL and VNNI
extern const Simd kAvx2;         // x86-64: AVX2, FMA and F16C
extern const Simd kNeonDotprod;  // aarch64: dotprod
extern const Simd kNeonI8mm;     // aarch64: dotprod and i8mm

}  // namespace meki
