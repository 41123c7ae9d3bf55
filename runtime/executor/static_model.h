#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/graph/graph.h"
#include "runtime/package/manifest.h"

namespace meki {

// A stage of the model, ready to be bound.
struct Stage {
  std::unique_ptr<Graph> graph;
  std::optional<LayerRange> rows;  // memory rows that it takes
};

// The stages of a package that is compiled for a chip. They have static shapes: one token, or `chunk` of them, over a
// KV cache of `context` tokens that they read and do not write (docs/package-format.md, "Compiled stages").
struct StaticModel {
  std::string soc;
  bool simulated = false;      // not on the chip
  bool shared_memory = false;  // the stages take the KV cache in memory that they share with the NPU
  size_t context = 0;
  size_t chunk = 0;
  std::unique_ptr<Graph> embed{};  // token ids to hidden states; takes any number of them
  std::vector<Stage> decode{};
  std::vector<Stage> prefill{};
  std::unique_ptr<Graph> head{};  // one hidden state to logits
  // Names of the float32 [1, T, hidden] tensors that pass from stage to stage.
  std::vector<std::string> hidden_names{};
};

// Loads and checks the target `soc` of the manifest: embed with `cpu`, everything else with `qnn`. Throws PackageError.
StaticModel load_static_model(const Manifest& manifest, const std::string& soc, bool simulated, const GraphLoader& cpu,
                              const GraphLoader& qnn);

// What an input or output of a compiled stage is, told by its name.
enum class StaticIoKind { past_length, rows, past_key, past_value, new_key, new_value, hidden };

struct StaticIo {
  StaticIoKind kind = StaticIoKind::hidden;
  uint32_t layer = 0;  // of a key or value
};

StaticIo parse_static_input(const std::string& name);
StaticIo parse_static_output(const std::string& name);

// The names of the hidden states between embed, the stages and the head.
inline constexpr const char* kEmbedding = "embedding";
inline constexpr const char* kFinal = "final";

}  // namespace meki
