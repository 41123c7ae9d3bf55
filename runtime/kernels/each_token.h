#pragma once

#include <algorithm>
#include <cstddef>

#include "runtime/base/parallel.h"

namespace meki {

// Calls work(t) for every token, some of them a piece: for what is not a matrix product.
template <class Work>
void each_token(size_t tokens, const Parallel& parallel, const Work& work) {
  constexpr size_t kTokens = 8;  // of a piece
  parallel((tokens + kTokens - 1) / kTokens, [tokens, &work](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(tokens, (piece + 1) * kTokens); ++t) work(t);
  });
}

}  // namespace meki
