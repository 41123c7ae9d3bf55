#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/package/ngram_hash.h"
#include "runtime/rows/row_decorator.h"

namespace meki {

// Rows of a table whose numbers are hashes of the last n tokens, for each layer of the memory, each n and each head
// (docs/package-format.md, "N-grams"). A token's row of a layer is those of its heads side by side.
class HashedNgrams final : public RowDecorator {
 public:
  // canonical: [vocab_size], or empty where token ids are canonical. Throws PackageError if a number of `hash` leads
  // out of the `entries` parts of `table`; `where` is for the message.
  HashedNgrams(std::shared_ptr<const RowSource> table, NgramHash hash, std::vector<int32_t> canonical, uint64_t entries,
               const std::string& where);

  RowShape shape() const override;
  size_t keys_per_token() const override { return hash_.layers.size() * hash_.heads_per_token(); }
  size_t history() const override { return hash_.ngram - 1; }
  void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const override;

 private:
  const NgramHash hash_;  // its resets ascending
  const std::vector<int32_t> canonical_;
};

}  // namespace meki
