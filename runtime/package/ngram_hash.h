#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace meki {

class Node;

// How n-grams become rows (docs/package-format.md, "N-grams"): numbers of the model, which nobody computes again.
// Passive data.
struct NgramHash {
  struct Layer {
    std::vector<uint64_t> multipliers;  // [ngram]
    std::vector<uint64_t> primes;       // [ngram - 1, heads]
    std::vector<uint64_t> offsets;      // likewise: the first row of each head
  };
  uint32_t ngram = 0;          // the longest, in tokens
  uint32_t heads = 0;          // of each length
  uint32_t pad = 0;            // canonical id of what is not there
  std::vector<int32_t> reset;  // token ids that no n-gram reaches across
  std::string canonical;       // file of the canonical ids, int32 [vocab_size]; empty: token ids are canonical
  uint32_t canonical_crc32c = 0;
  std::vector<Layer> layers;

  static constexpr uint32_t kMaxNgram = 8;
  static constexpr uint32_t kMaxRowsPerToken = 4096;

  size_t heads_per_token() const { return size_t{ngram - 1} * heads; }

  // The member `address` of a manifest's memory of `layers` layers. Throws PackageError.
  static NgramHash parse(const Node& address, uint32_t vocab_size, uint32_t layers);
};

}  // namespace meki
