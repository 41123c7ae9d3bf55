#pragma once

#include "runtime/rows/prefetcher.h"

namespace meki::test {

// Requests the rows of all tokens from sequence[first] on, and of no more.
inline RowRequest request(Prefetcher& prefetcher, std::span<const int32_t> sequence, size_t first = 0) {
  return prefetcher.request(sequence, first, sequence.size() - first);
}

// The number of the buffer that a request holds; buffers() if it is none of the prefetcher's.
inline size_t buffer_of(const Prefetcher& prefetcher, const RowRequest& request) {
  size_t buffer = 0;
  while (buffer < prefetcher.buffers() && prefetcher.rows(buffer) != request.rows()) ++buffer;
  return buffer;
}

}  // namespace meki::test
