#pragma once

// A fake at the seam runtime/graph/graph.h: stages whose logits depend, in integers, on every token and memory row of
// the sequence and on their order, through a KV cache, what convolutions have seen and hidden tensors. A wrong row,
// position, length, cache or chunk gives other logits, and a plain recurrence without cache, stages or chunks gives the
// expected ones.

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/graph/graph.h"
#include "tests/cpp/support.h"

namespace meki::test {

// Makes graph runs fail, or tells of them.
struct Fault {
  std::atomic<int> countdown = 0;  // above 0: every run takes one off, and the one that reaches 0 throws
  std::atomic<bool> nan = false;   // all logits are NaN
  std::function<void(int64_t tokens, int64_t total)> on_run;  // not empty: told of every run: its tokens, and how many
                                                              // there are then in the cache
};

// A graph that does what its inputs and outputs are named for. It checks the types, shapes and bindings that it is
// given, and throws std::logic_error for wrong ones.
class FakeGraph final : public Graph {
 public:
  FakeGraph(std::vector<std::string> inputs, std::vector<std::string> outputs, Fault* fault = nullptr)
      : inputs_(std::move(inputs)), outputs_(std::move(outputs)), fault_(fault) {}
  const std::vector<std::string>& inputs() const override { return inputs_; }
  const std::vector<std::string>& outputs() const override { return outputs_; }
  std::unique_ptr<Binding> bind(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const override;

 private:
  std::vector<std::string> inputs_;
  std::vector<std::string> outputs_;
  Fault* fault_;
};

// A model of fake stages over a ROM file.
class FakeModel {
 public:
  enum class Kind { dense, one_stage, two_stages, three_stages };
  static constexpr uint32_t kVocab = 37;
  static constexpr uint32_t kContext = 48;

  explicit FakeModel(Kind kind, std::vector<int32_t> eos_token_ids = {});

  // Bundles of the ROM file, which an open engine reads.
  void damage(int64_t token) const;
  void repair(int64_t token) const;

  // The expected logits of the last of `tokens`, float32 [kVocab].
  std::vector<float> logits(std::span<const int64_t> tokens) const;
  // The `count` tokens that greedy decoding makes after `tokens`.
  std::vector<int64_t> greedy(std::vector<int64_t> tokens, size_t count) const;

  std::shared_ptr<const Engine> engine;
  mutable Fault fault;

 private:
  struct Layers {  // of one stage
    uint32_t first;
    uint32_t last;
    bool rows;  // whether it takes their memory rows
  };
  TempDir dir_;
  RomImage image_;
  std::vector<Layers> stages_;
};

}  // namespace meki::test
