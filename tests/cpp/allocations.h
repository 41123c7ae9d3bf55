#pragma once

#include <cstdint>

namespace meki::test {

// Sanitizers bring their own operator new.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kCountsAllocations = false;
#else
inline constexpr bool kCountsAllocations = true;
#endif

// Calls of operator new since the program began, from all threads. 0 unless kCountsAllocations.
uint64_t allocations();

}  // namespace meki::test
