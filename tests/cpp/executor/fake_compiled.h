#pragma once

// A fake of a model that is compiled for a chip, at the seam runtime/graph/graph.h: stages of static shapes that read
// the KV cache and give new keys and values. As in fake_graph.h, logits depend, in integers, on every token and memory
// row of the sequence and on their order, and a plain recurrence gives the expected ones.

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/graph/graph.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki::test {

struct CompiledFault : Fault {
  bool infinite = false;                                  // a new key or value is infinite
  std::function<void(const std::string& file)> on_run{};  // before each run of a graph

  // Memory that the device shares.
  size_t shared_room = 0;                            // pieces that it has
  bool refuses_shared = false;                       // a run with it fails
  std::map<const void*, const void*> shared{};       // what is allocated, and the graph that gave it
  std::map<std::string, const void*> shared_inputs;  // those that were bound last
  size_t misuses = 0;                                // freed twice, before a binding to it, or not before its graph
};

class FakeCompiledModel {
 public:
  enum class Kind { dense, two_stages, three_stages };
  static constexpr uint32_t kVocab = 37;
  static constexpr uint32_t kContext = 24;
  static constexpr uint32_t kChunk = 4;

  explicit FakeCompiledModel(Kind kind, uint32_t chunk = kChunk);

  // The expected logits of the last of `tokens`, float32 [kVocab].
  std::vector<float> logits(std::span<const int64_t> tokens) const;
  std::vector<int64_t> greedy(std::vector<int64_t> tokens, size_t count) const;

  void damage(int64_t token) const;
  void repair(int64_t token) const;

  // Loads the stages again; `spoil` changes what graphs declare, by file.
  using Names = std::pair<std::vector<std::string>, std::vector<std::string>>;
  std::shared_ptr<const Backend> load(const std::function<void(const std::string& file, Names&)>& spoil = {}) const;

  mutable CompiledFault fault;  // outlives the graphs
  std::shared_ptr<const Engine> engine;

 private:
  struct Layers {  // of one stage
    uint32_t first;
    uint32_t last;
    std::optional<LayerRange> rows;
  };
  Names names(const std::string& file) const;

  TempDir dir_;
  RomImage image_;
  std::vector<Layers> stages_;
  Manifest manifest_;
  std::shared_ptr<const RowSource> rows_;
};

}  // namespace meki::test
