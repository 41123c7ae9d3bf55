#include "fuzz/check_manifest.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "runtime/package/manifest.h"

namespace meki::fuzz {
namespace {

bool is_plain(const std::string& name) {
  const std::filesystem::path path(name);
  return !name.empty() && path.filename() == path && name != "." && name != ".." &&
         name.find('\0') == std::string::npos;
}

void check_stages(const std::vector<StageInfo>& stages, const Manifest& manifest, const FileSizes& files) {
  for (const StageInfo& stage : stages) {
    require(is_plain(stage.file) && files.contains(stage.file), "a stage is a file of the package");
    if (!stage.rows) continue;
    require(manifest.memory.has_value(), "rows come of a memory");
    require(stage.rows->first < stage.rows->last && stage.rows->last <= manifest.memory->layers,
            "rows are some of the memory's layers");
  }
}

// What hashed_ngrams.cc trusts, in arithmetic that cannot overflow.
void check_ngrams(const NgramHash& hash, const Manifest& manifest) {
  __extension__ using Wide = unsigned __int128;
  const uint64_t vocab_size = manifest.architecture.vocab_size;
  require(hash.ngram >= 2 && hash.ngram <= NgramHash::kMaxNgram && hash.heads >= 1, "an n-gram has tokens and heads");
  require(hash.layers.size() == manifest.memory->layers, "numbers for each layer");
  require(Wide{hash.layers.size()} * hash.heads_per_token() <= NgramHash::kMaxRowsPerToken, "few rows a token");
  require(hash.pad < vocab_size, "a padding of the vocabulary");
  for (const int32_t id : hash.reset) require(id >= 0 && static_cast<uint64_t>(id) < vocab_size, "so are resets");
  require(hash.canonical.empty() || (is_plain(hash.canonical) && manifest.files.contains(hash.canonical)),
          "the canonical ids are a file of the package");
  for (const NgramHash::Layer& layer : hash.layers) {
    require(layer.multipliers.size() == hash.ngram, "a multiplier for each token");
    require(layer.primes.size() == hash.heads_per_token() && layer.offsets.size() == layer.primes.size(),
            "a table for each head");
    for (const uint64_t number : layer.multipliers) require(Wide{number} * vocab_size <= INT64_MAX, "no overflow");
    for (const uint64_t number : layer.primes) require(number >= 1 && number <= INT32_MAX, "nothing modulo 0");
    for (const uint64_t number : layer.offsets) require(number <= INT32_MAX, "rows that a table may have");
  }
}

void check_target(const std::string& chip, const QnnTarget& target, const Manifest& manifest) {
  require(is_plain(chip) && target.directory == manifest.directory / "qnn" / chip, "a target's files are below it");
  require(target.context >= 1 && target.context <= manifest.architecture.context, "no context beyond the model's");
  require(target.chunk >= 1 && target.chunk <= target.context, "no chunk beyond the context");
  require(!target.decode.empty() && target.decode.size() == target.prefill.size(), "prefill is cut as decode is");
  require(target.dense_decode.size() == target.dense_prefill.size(), "so are the dense ones");
  for (const auto* stages : {&target.decode, &target.prefill, &target.dense_decode, &target.dense_prefill}) {
    check_stages(*stages, manifest, target.files);
  }
  require(target.files.contains(target.embed) && target.files.contains(target.head), "embedding and head are there");
}

}  // namespace

void check_manifest(std::string_view text) {
  static const Scratch scratch;
  scratch.write("manifest.json", text);
  Manifest manifest;
  if (!accepts([&] { manifest = Manifest::open(scratch.path()); })) return;

  require(manifest.json == text, "the text as it is in the file");
  const Architecture& a = manifest.architecture;
  for (const uint32_t size : {a.vocab_size, a.layers, a.hidden, a.context}) {
    require(size >= 1 && size <= INT32_MAX, "sizes within their limits");
  }
  require(a.kv_caches.size() == a.layers, "keys and values of every layer");
  for (const KvCacheInfo& cache : a.kv_caches) {
    require(cache.kv_heads >= 1 && cache.head_dim >= 1 && cache.window <= INT32_MAX, "sizes within their limits");
    require(!cache.shared || !a.kv_caches.at(*cache.shared).shared, "a cache that is shared is its layer's own");
  }
  for (const int32_t id : manifest.eos_token_ids) {
    require(id >= 0 && static_cast<uint32_t>(id) < a.vocab_size, "end tokens of the vocabulary");
  }
  require(!manifest.stages.empty(), "at least one stage");
  require(manifest.dense_stages.empty() == !manifest.memory, "dense stages exactly beside a memory");
  check_stages(manifest.stages, manifest, manifest.files);
  check_stages(manifest.dense_stages, manifest, manifest.files);
  require(!manifest.memory || manifest.files.contains(manifest.memory->file), "the memory is a file of the package");
  if (manifest.memory && manifest.memory->address == "ngram_hash") check_ngrams(manifest.memory->ngrams, manifest);
  for (const auto& [name, bytes] : manifest.files) require(is_plain(name), "plain file names");
  for (const auto& entry : manifest.qnn) {
    const std::string& chip = entry.first;
    check_target(chip, entry.second, manifest);
    require(manifest.find_target(chip) == chip, "a target is found by its name");
    accepts([&] { manifest.check_target_files(chip); });
  }
  try {
    manifest.find_target("");
    require(manifest.qnn.size() == 1, "no name stands for the only target");
  } catch (const std::invalid_argument&) {
    require(manifest.qnn.size() != 1, "no name stands for the only target");
  }
  accepts([&] { manifest.check_files(); });
  const Manifest dense = manifest.without_memory();
  require(!dense.memory && !dense.stages.empty(), "a dense model has no memory");
}

}  // namespace meki::fuzz
