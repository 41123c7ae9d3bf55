#include <vector>

#include "runtime/kernels/simd/paths.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace meki {
namespace {

size_t find_fetch_ahead() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return size_t{8} << 10;
#endif
  return 0;
}

std::vector<const Simd*> find_paths() {
  std::vector<const Simd*> paths;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // Clang 14 has no __builtin_cpu_supports("f16c")
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    paths.push_back(&kAvx512Vnni);
  }
  if (avx2) paths.push_back(&kAvx2);
#elif defined(__aarch64__)
  constexpr unsigned long kDotprod = 1UL << 20;  // ASIMDDP in AT_HWCAP
  constexpr unsigned long kI8mm = 1UL << 13;     // in AT_HWCAP2
  const bool dotprod = (::getauxval(AT_HWCAP) & kDotprod) != 0;
  if (dotprod && (::getauxval(AT_HWCAP2) & kI8mm) != 0) paths.push_back(&kNeonI8mm);
  if (dotprod) paths.push_back(&kNeonDotprod);
#endif
  paths.push_back(&kPortable);
  return paths;
}

}  // namespace

const size_t kFetchAhead = find_fetch_ahead();

std::span<const Simd* const> simd_paths() {
  static const std::vector<const Simd*> paths = find_paths();
  return paths;
}

}  // namespace meki
