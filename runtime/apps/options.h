#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"

namespace meki::bench {

// What the command line asks for. Passive data.
struct Options {
  std::filesystem::path package;
  EngineOptions engine{.onnxruntime = {}, .row_cache = 0};  // all rounds decode the same tokens
  bool cold = false;                                        // drop the ROM from the page cache before every step
  std::optional<size_t> depth;     // tokens in the cache when decode begins; default: as many as fit, at most 10240
  std::optional<size_t> prefill;   // tokens of a prefill, 0: none; default: as many as fit, at most 512
  size_t tokens = 32;              // decode steps of a round
  size_t repetitions = 5;          // rounds
  std::filesystem::path json;      // empty: standard output
  std::vector<int64_t> token_ids;  // not empty: nothing is measured, their logits are written
  std::filesystem::path logits;    // to this file: float32 [token_ids, vocab_size], little-endian
};

// Nothing if help is asked for. Throws std::invalid_argument for what the command line may not say.
std::optional<Options> parse_options(int argc, char** argv);

// What --help prints.
std::string help();

}  // namespace meki::bench
