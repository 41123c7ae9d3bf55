#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runtime/package/ngram_hash.h"

namespace meki {

// Keys and values of a layer: a member of "kv_caches".
struct KvCacheInfo {
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t window = 0;               // positions that a token sees, itself included; 0: all
  std::optional<uint32_t> shared{};  // the earlier layer whose cache it is, whose shape the rest is; none: its own
};

// The shape of the decoder; the fields of "architecture" that the runtime needs, and "kv_caches".
struct Architecture {
  uint32_t vocab_size = 0;
  uint32_t layers = 0;
  uint32_t hidden = 0;
  uint32_t context = 0;                // longest sequence, in tokens
  std::vector<KvCacheInfo> kv_caches;  // of each layer
};

// A memory whose rows lie in storage; the fields of "memory" that the runtime needs.
struct MemoryInfo {
  std::string kind{};       // for people: "meki", "engram"
  std::string address;      // how tokens become rows: "token" or "ngram_hash"
  NgramHash ngrams{};       // with "ngram_hash"
  uint32_t vocab_size = 0;  // of the table, with "token": tokens beyond it have its first entry
  uint32_t layers = 0;      // of the memory: each token has that many rows
  uint32_t row_dim = 0;
  std::string file;
  std::string row_type;
  std::string content_id;

  // What a run reads of it.
  std::vector<std::string> files() const {
    return ngrams.canonical.empty() ? std::vector{file} : std::vector{file, ngrams.canonical};
  }
};

// Memory rows that a stage takes: those of the memory's layers first .. last - 1.
struct LayerRange {
  uint32_t first = 0;
  uint32_t last = 0;
};

struct StageInfo {
  std::string file;
  std::optional<LayerRange> rows;
};

// File names and their sizes in bytes.
using FileSizes = std::map<std::string, uint64_t>;

// The model compiled for one chip: static shapes, one token or `chunk` of them, over a KV cache of `context` tokens.
struct QnnTarget {
  std::filesystem::path directory;  // where its files are
  std::string chip;                 // for people
  std::string precision;            // for people
  uint32_t soc_model = 0;           // Qualcomm's numbers of the chip and of its NPU
  uint32_t htp_arch = 0;
  uint32_t context = 0;
  uint32_t chunk = 0;
  std::string embed;  // token ids to hidden states, on the CPU
  std::string head;   // one hidden state to logits
  std::vector<StageInfo> decode;
  std::vector<StageInfo> prefill;       // cut as decode is
  std::vector<StageInfo> dense_decode;  // both without the memory; empty where they were not compiled
  std::vector<StageInfo> dense_prefill;
  FileSizes files;
};

// A checked manifest.json (docs/package-format.md). Passive data.
struct Manifest {
  std::filesystem::path directory;
  std::string name;
  Architecture architecture;
  std::optional<MemoryInfo> memory;
  std::vector<StageInfo> stages;
  std::vector<StageInfo> dense_stages;  // the backbone without its memory; empty in a dense package
  std::string weight_type;              // of the dense weights: "float32", or a packed one
  std::vector<int32_t> eos_token_ids;
  FileSizes files;
  std::map<std::string, QnnTarget> qnn;  // by chip; empty: nothing is compiled
  std::string json;                      // the text of the file

  // Reads and checks `directory`/manifest.json alone: format, limits, names. Throws PackageError.
  static Manifest open(const std::filesystem::path& directory);

  // What a run on the CPU needs: every file of the package is there with its stated size. Throws PackageError.
  void check_files() const;
  // What a run on the chip `soc` needs, and no more: the ROM and the target's own files. Throws as find_target, and
  // PackageError.
  void check_target_files(const std::string& soc) const;

  // The same model as a dense one.
  Manifest without_memory() const;

  // The key in `qnn` for a chip's name; an empty one stands for the only one there is. Throws std::invalid_argument
  // with the chips that the package is compiled for, and how to compile it.
  std::string find_target(const std::string& soc) const;
};

}  // namespace meki
