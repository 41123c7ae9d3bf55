#include "runtime/rows/hashed_ngrams.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "runtime/base/error.h"

namespace meki {
namespace {

NgramHash with_sorted_resets(NgramHash hash) {
  std::sort(hash.reset.begin(), hash.reset.end());
  return hash;
}

}  // namespace

HashedNgrams::HashedNgrams(std::shared_ptr<const RowSource> table, NgramHash hash, std::vector<int32_t> canonical,
                           uint64_t entries, const std::string& where)
    : RowDecorator(std::move(table)), hash_(with_sorted_resets(std::move(hash))), canonical_(std::move(canonical)) {
  for (const NgramHash::Layer& layer : hash_.layers) {
    for (size_t head = 0; head < layer.primes.size(); ++head) {
      const uint64_t end = layer.offsets[head] + layer.primes[head];
      if (end <= entries) continue;
      throw PackageError(where + ": n-grams lead to row " + std::to_string(end - 1) + ", the table has " +
                         std::to_string(entries) + "; the file belongs to another package");
    }
  }
}

RowShape HashedNgrams::shape() const {
  return {static_cast<uint32_t>(hash_.layers.size()), static_cast<uint32_t>(part().row_dim * hash_.heads_per_token())};
}

void HashedNgrams::keys(std::span<const int32_t> sequence, std::span<RowKey> out) const {
  std::array<uint64_t, NgramHash::kMaxNgram> window{};  // canonical ids, the last token's first
  bool open = true;                                     // nothing between here and the last token resets
  for (size_t back = 0; back < hash_.ngram; ++back) {
    open = open && back < sequence.size();
    const int32_t token = open ? sequence[sequence.size() - 1 - back] : 0;
    if (back > 0) open = open && !std::binary_search(hash_.reset.begin(), hash_.reset.end(), token);
    const int32_t id = canonical_.empty() || !open ? token : canonical_[static_cast<size_t>(token)];
    window[back] = open ? static_cast<uint64_t>(id) : hash_.pad;
  }
  const uint32_t dim = part().row_dim;
  RowKey* key = out.data();
  for (uint32_t number = 0; number < hash_.layers.size(); ++number) {
    const NgramHash::Layer& layer = hash_.layers[number];
    uint64_t mix = window[0] * layer.multipliers[0];
    uint32_t head = 0;
    for (size_t n = 2; n <= hash_.ngram; ++n) {
      mix ^= window[n - 1] * layer.multipliers[n - 1];
      for (uint32_t i = 0; i < hash_.heads; ++i, ++head) {
        *key++ = {mix % layer.primes[head] + layer.offsets[head], number, head * dim};
      }
    }
  }
}

}  // namespace meki
