#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace meki {

// The shape of the decoder; the fields of "architecture" that the runtime needs.
struct Architecture {
  uint32_t vocab_size = 0;
  uint32_t layers = 0;
  uint32_t hidden = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t memory_dim = 0;  // 0: dense
  uint32_t context = 0;     // longest sequence, in tokens
};

struct MemoryInfo {
  std::string file;
  std::string row_type;
  std::string content_id;
};

// Memory rows that a stage takes: layers first .. last - 1.
struct LayerRange {
  uint32_t first = 0;
  uint32_t last = 0;
};

struct StageInfo {
  std::string file;
  std::optional<LayerRange> rows;
};

// A checked manifest.json (docs/package-format.md). Passive data.
struct Manifest {
  std::filesystem::path directory;
  std::string name;
  Architecture architecture;
  std::optional<MemoryInfo> memory;
  std::vector<StageInfo> stages;
  std::vector<StageInfo> dense_stages;  // the backbone without its memory; empty in a dense package
  std::vector<int32_t> eos_token_ids;
  std::string json;  // the text of the file

  // Reads and checks `directory`/manifest.json: format, limits, file names, and that every file is there with its
  // stated size. Throws PackageError.
  static Manifest open(const std::filesystem::path& directory);
};

}  // namespace meki
