// runtime/rows/hashed_ngrams, against docs/package-format.md, "N-grams".

#include "runtime/rows/hashed_ngrams.h"

#include <algorithm>
#include <limits>
#include <random>

#include "runtime/base/error.h"
#include "runtime/rows/prefetcher.h"
#include "runtime/rows/token_table.h"
#include "tests/cpp/rows/requests.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::RomImage;
using test::TempDir;

constexpr uint32_t kHeadDim = 5;
constexpr uint32_t kEntries = 230;
constexpr uint64_t kManyEntries = uint64_t{1} << 32;  // beyond every prime and offset

// A ROM file with a row of one head a bundle.
struct Table {
  Table() : image({.vocab_size = kEntries, .layers = 1, .row_dim = kHeadDim, .row_type = test::kFloat16}, 5) {
    test::write_file(dir / "memory.rom", image.bytes);
    rom = std::make_shared<const TokenTable>(dir / "memory.rom", RomAccess::pread);
  }
  std::shared_ptr<const HashedNgrams> ngrams(const NgramHash& hash, std::vector<int32_t> canonical,
                                             uint64_t entries = kEntries) const {
    return std::make_shared<const HashedNgrams>(rom, hash, std::move(canonical), entries, "some.rom");
  }

  TempDir dir;
  RomImage image;
  std::shared_ptr<const TokenTable> rom;
};

struct Hash {
  NgramHash numbers;
  std::vector<int32_t> canonical;
};

// Any numbers that the format allows, for the rows of a table of `entries`.
Hash random_hash(std::mt19937_64& random, uint32_t vocab_size, uint64_t entries) {
  const auto between = [&random](uint64_t first, uint64_t last) { return first + random() % (last - first + 1); };
  constexpr uint64_t kLimit = (1ULL << 31) - 1;
  const uint64_t largest = std::numeric_limits<int64_t>::max() / uint64_t{vocab_size};
  Hash hash;
  NgramHash& numbers = hash.numbers;
  numbers.ngram = static_cast<uint32_t>(between(2, 8));
  numbers.heads = static_cast<uint32_t>(between(1, 3));
  numbers.pad = static_cast<uint32_t>(between(0, vocab_size - 1));
  for (auto left = random() % 3; left > 0; --left) {
    numbers.reset.push_back(static_cast<int32_t>(between(0, vocab_size - 1)));
  }
  const bool canonical = vocab_size < 1000 && random() % 2 == 0;
  for (uint32_t token = 0; canonical && token < vocab_size; ++token) {
    hash.canonical.push_back(static_cast<int32_t>(between(0, vocab_size - 1)));
  }
  numbers.layers.resize(between(1, 3));
  for (NgramHash::Layer& layer : numbers.layers) {
    for (uint32_t n = 0; n < numbers.ngram; ++n) {
      layer.multipliers.push_back(random() % 4 == 0 ? largest : between(1, largest));
    }
    for (uint32_t head = 0; head < (numbers.ngram - 1) * numbers.heads; ++head) {
      layer.primes.push_back(between(1, std::min(kLimit, entries)));
      layer.offsets.push_back(between(0, std::min(kLimit, entries - layer.primes.back())));
    }
  }
  return hash;
}

// c of the token `back` before `position`, as the format has it.
uint64_t naive_canonical(const Hash& hash, std::span<const int32_t> sequence, size_t position, size_t back) {
  if (back > position) return hash.numbers.pad;
  for (size_t i = position - back; i < position; ++i) {
    if (std::count(hash.numbers.reset.begin(), hash.numbers.reset.end(), sequence[i]) > 0) return hash.numbers.pad;
  }
  const int32_t token = sequence[position - back];
  return static_cast<uint64_t>(hash.canonical.empty() ? token : hash.canonical[static_cast<size_t>(token)]);
}

// The bundle of one head, in numbers that do not overflow.
uint64_t naive_index(const Hash& hash, std::span<const int32_t> sequence, size_t position, size_t layer, size_t head) {
  __extension__ using Wide = unsigned __int128;
  const NgramHash::Layer& numbers = hash.numbers.layers[layer];
  const size_t length = 2 + head / hash.numbers.heads;
  Wide mix = 0;
  for (size_t back = 0; back < length; ++back) {
    mix ^= Wide{naive_canonical(hash, sequence, position, back)} * numbers.multipliers[back];
  }
  return static_cast<uint64_t>(mix % numbers.primes[head]) + numbers.offsets[head];
}

TEST_CASE("hashed n-grams: keys are those of the formula, of whole sequences and of their last tokens") {
  const Table table;
  std::mt19937_64 random(6);
  for (int round = 0; round < 300; ++round) {
    constexpr uint32_t kLargest = (1U << 31) - 1;
    const uint32_t vocab_size = std::vector<uint32_t>{1, 4, 40, kLargest}[random() % 4];
    const Hash hash = random_hash(random, vocab_size, kManyEntries);
    const auto ngrams = table.ngrams(hash.numbers, hash.canonical, kManyEntries);
    const size_t heads = size_t{hash.numbers.ngram - 1} * hash.numbers.heads;
    const size_t layers = hash.numbers.layers.size();
    REQUIRE(ngrams->history() == hash.numbers.ngram - 1);
    REQUIRE(ngrams->keys_per_token() == layers * heads);

    std::vector<int32_t> sequence;  // in which tokens come again, the resets among them
    for (int i = 0; i < 25; ++i) {
      const bool again = !hash.numbers.reset.empty() && random() % 4 == 0;
      sequence.push_back(again ? hash.numbers.reset[random() % hash.numbers.reset.size()]
                               : static_cast<int32_t>(random() % 3 == 0 ? vocab_size - 1 : random() % vocab_size));
    }
    size_t wrong = 0;
    for (size_t position = 0; position < sequence.size(); ++position) {
      const std::span<const int32_t> whole = std::span(sequence).first(position + 1);
      const auto window = whole.last(std::min(whole.size(), ngrams->history() + 1));
      for (const std::span<const int32_t> given : {whole, window}) {
        std::vector<RowKey> keys(layers * heads, {.index = kManyEntries, .layer = 99, .column = 99});
        ngrams->keys(given, keys);
        for (size_t i = 0; i < keys.size(); ++i) {
          const bool same = keys[i].index == naive_index(hash, sequence, position, i / heads, i % heads) &&
                            keys[i].layer == i / heads && keys[i].column == i % heads * kHeadDim;
          wrong += same ? 0 : 1;
        }
      }
    }
    CAPTURE(round);
    CHECK(wrong == 0);
  }
}

TEST_CASE("hashed n-grams: a reset hides what is before it and itself, and not its own token's rows") {
  const Table table;
  NgramHash hash;
  hash.ngram = 3;
  hash.heads = 1;
  hash.pad = 9;
  hash.reset = {7};
  hash.layers = {{{1, 100, 10'000}, {1 << 20, 1 << 20}, {0, 0}}};
  const auto ngrams = table.ngrams(hash, {}, kManyEntries);
  // Both indices of the last token: its bigram's and its trigram's.
  const auto indices = [&ngrams](const std::vector<int32_t>& sequence) {
    std::vector<RowKey> keys(2);
    ngrams->keys(sequence, keys);
    return std::pair(keys[0].index, keys[1].index);
  };
  const auto mix = [](uint64_t last, uint64_t previous, uint64_t before) {
    return std::pair(last ^ previous * 100, last ^ previous * 100 ^ before * 10'000);
  };
  CHECK(indices({1, 2, 3}) == mix(3, 2, 1));
  CHECK(indices({3}) == mix(3, 9, 9));
  CHECK(indices({2, 3}) == mix(3, 2, 9));
  CHECK(indices({1, 2, 7}) == mix(7, 2, 1));
  CHECK(indices({1, 7, 3}) == mix(3, 9, 9));
  CHECK(indices({7, 2, 3}) == mix(3, 2, 9));
  CHECK(indices({7, 7, 7}) == mix(7, 9, 9));
}

TEST_CASE("hashed n-grams: rows land in their layer, heads side by side") {
  const Table table;
  std::mt19937_64 random(7);
  for (int round = 0; round < 20; ++round) {
    const Hash hash = random_hash(random, 11, kEntries);
    const auto ngrams = table.ngrams(hash.numbers, hash.canonical);
    const size_t heads = size_t{hash.numbers.ngram - 1} * hash.numbers.heads;
    const size_t layers = hash.numbers.layers.size();
    const RowShape shape = ngrams->shape();
    REQUIRE(shape.layers == layers);
    REQUIRE(shape.row_dim == heads * kHeadDim);
    CHECK(ngrams->part().layers == 1);
    CHECK(ngrams->part().row_dim == kHeadDim);
    std::vector<int32_t> sequence;
    for (int i = 0; i < 15; ++i) sequence.push_back(static_cast<int32_t>(random() % 11));
    for (const size_t first : {0, 4, 14}) {
      const size_t tokens = sequence.size() - first;
      std::vector<float> expected;
      for (size_t layer = 0; layer < layers; ++layer) {
        for (size_t position = first; position < sequence.size(); ++position) {
          for (size_t head = 0; head < heads; ++head) {
            const uint64_t index = naive_index(hash, sequence, position, layer, head);
            for (uint32_t i = 0; i < kHeadDim; ++i) expected.push_back(table.image.value(index, 0, i));
          }
        }
      }
      Prefetcher prefetcher(ngrams, 15, 1, round % 2 == 0);
      RowRequest request = test::request(prefetcher, sequence, first);
      request.wait();
      CAPTURE(round);
      CHECK(std::equal(expected.begin(), expected.end(), request.rows()));
      CHECK(prefetcher.counters().requests <= layers * tokens * heads);
    }
  }
}

TEST_CASE("hashed n-grams: numbers that lead out of the table are an error that names the file and the row") {
  const Table table;
  NgramHash hash;
  hash.ngram = 2;
  hash.heads = 2;
  hash.layers = {{{1, 1}, {7, 10}, {0, 7}}, {{1, 1}, {5, 30}, {17, kEntries - 30}}};
  CHECK_NOTHROW(table.ngrams(hash, {}));
  const std::pair<uint64_t, uint64_t> wrong[] = {// prime and offset
                                                 {31, kEntries - 30},
                                                 {30, kEntries - 29},
                                                 {1, kEntries},
                                                 {kEntries + 1, 0},
                                                 {INT32_MAX, INT32_MAX}};
  for (const auto& [prime, offset] : wrong) {
    NgramHash changed = hash;
    changed.layers[1].primes[1] = prime;
    changed.layers[1].offsets[1] = offset;
    const std::string message = error_of<PackageError>([&] { table.ngrams(changed, {}); });
    check_names(message, "some.rom");
    check_names(message, "row " + std::to_string(prime + offset - 1));
    check_names(message, std::to_string(kEntries));
  }
}

}  // namespace
}  // namespace meki
