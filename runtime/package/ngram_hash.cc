#include "runtime/package/ngram_hash.h"

#include "runtime/package/node.h"

namespace meki {
namespace {

std::vector<uint64_t> parse_numbers(const Node& node, size_t count, uint64_t low, uint64_t high) {
  const auto items = node.items();
  if (items.size() != count) node.fail(std::to_string(count) + " integers");
  std::vector<uint64_t> numbers;
  numbers.reserve(count);
  for (const Node& item : items) numbers.push_back(item.integer(low, high));
  return numbers;
}

}  // namespace

NgramHash NgramHash::parse(const Node& address, uint32_t vocab_size, uint32_t layers) {
  NgramHash hash;
  hash.ngram = static_cast<uint32_t>(address.at("ngram").integer(2, kMaxNgram));
  hash.heads = static_cast<uint32_t>(address.at("heads").integer(1, kMaxRowsPerToken));
  if (hash.heads_per_token() * layers > kMaxRowsPerToken) {
    address.at("heads").fail("so few that a token has at most " + std::to_string(kMaxRowsPerToken) + " rows");
  }
  hash.pad = static_cast<uint32_t>(address.at("pad").integer(0, vocab_size - 1));
  for (const Node& id : address.at("reset").items()) {
    hash.reset.push_back(static_cast<int32_t>(id.integer(0, vocab_size - 1)));
  }
  if (const Node canonical = address.at("canonical"); !canonical.is_null()) {
    hash.canonical = canonical.at("file").file_name();
    hash.canonical_crc32c = static_cast<uint32_t>(canonical.at("crc32c").integer(0, UINT32_MAX));
  }
  const Node hashes = address.at("layers");
  for (const Node& node : hashes.items()) {
    // No product of a canonical id and a multiplier, and no row's number, exceeds 63 bits.
    hash.layers.push_back({parse_numbers(node.at("multipliers"), hash.ngram, 1, INT64_MAX / vocab_size),
                           parse_numbers(node.at("primes"), hash.heads_per_token(), 1, INT32_MAX),
                           parse_numbers(node.at("offsets"), hash.heads_per_token(), 0, INT32_MAX)});
  }
  if (hash.layers.size() != layers)
    hashes.fail("an entry for each of the memory's " + std::to_string(layers) + " layers");
  return hash;
}

}  // namespace meki
