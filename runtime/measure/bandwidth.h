#pragma once

#include <cstddef>

namespace meki {

// Bytes per second that `threads` threads read together, each once through its share of a buffer of `bytes` bytes that
// is in memory, in huge pages where the system gives them. Throws std::invalid_argument for no threads or less than 1
// MiB a thread, std::bad_alloc.
double read_bandwidth(size_t threads, size_t bytes);

}  // namespace meki
