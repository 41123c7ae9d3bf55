#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/package/manifest.h"

namespace meki {

struct Stage;

// What an input or output of a stage is, told by its name (docs/package-format.md, "Stages").
enum class IoKind { token_ids, total_sequence_length, rows, logit_index, cache, logits, hidden };

struct IoName {
  IoKind kind = IoKind::hidden;
  uint32_t layer = 0;  // of a cache
};

IoName parse_input(const std::string& name);
IoName parse_output(const std::string& name);

// Checks that the stages fit the manifest and each other: every layer's cache in exactly one stage, every hidden input
// made by an earlier stage, rows where the manifest says, logits from one stage. Returns the hidden tensors' names.
// Throws PackageError.
std::vector<std::string> check_stages(const Manifest& manifest, const std::vector<Stage>& stages);

}  // namespace meki
