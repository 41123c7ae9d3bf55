#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/executor/static_model.h"
#include "runtime/executor/steps.h"

namespace meki {

// Steps of stages with static shapes: one token runs the decode graph, more run the prefill graph, padded to its width.
// The stages read the KV cache and give the keys and values of the step's tokens, which enter the cache when all of the
// step has succeeded; so a step that fails, and what is computed for the padding, leaves nothing behind. All memory is
// allocated and bound once; the cache always has the target's full context.
class StaticSteps final : public Steps {
 public:
  StaticSteps(const Engine& engine, bool prefetch);

  void request(int slot, std::span<const int32_t> sequence, size_t first) override;
  uint64_t run(const Step& step) override;
  // A step reads all of the cache, whatever is in it.
  size_t cache_bytes(size_t tokens) const override;
  void fill_cache(size_t first, size_t last) override;

 private:
  // The stages for steps of one width, bound once for each of the prefetcher's buffers.
  struct Pass {
    const std::vector<Stage>& stages;
    size_t width = 1;
    std::unique_ptr<Binding> embed;
    std::array<Bindings, kSlots> buffers;
  };
  // One layer's cache and what a step adds to it; views, float16 (`T` is the width of the step).
  struct Layer {
    uint16_t* keys = nullptr;        // [kv_heads, head_dim, context]
    uint16_t* values = nullptr;      // [kv_heads, context, head_dim]
    uint16_t* new_keys = nullptr;    // [kv_heads, head_dim, T]
    uint16_t* new_values = nullptr;  // [kv_heads, T, head_dim]
  };

  void allocate_cache(std::optional<uint64_t> bytes);
  // The memory of a layer's keys (2 * layer) or values (2 * layer + 1).
  uint16_t* cache(size_t tensor) const;

  void bind(Pass& pass) const;
  Tensor input(const std::string& name, const Stage& stage, size_t width, size_t buffer) const;
  Tensor output(const std::string& name, size_t width) const;
  Tensor cached(Tensor tensor) const;
  Tensor keys(const std::string& name, uint16_t* data, size_t tokens) const;
  Tensor values(const std::string& name, uint16_t* data, size_t tokens) const;
  Tensor hidden(const std::string& name, size_t width) const;

  void run_head(const Step& step);
  void check_finite(size_t width, size_t tokens) const;
  void store(size_t width, size_t tokens, size_t past) const;

  const StaticModel& model_;
  const size_t kv_heads_;
  const size_t head_dim_;
  Mapping cache_;                           // all tensors of the cache, or, where the NPU shares them,
  std::vector<SharedMemory> shared_cache_;  // each
  size_t cache_bytes_ = 0;
  Mapping added_;        // new keys and values of all layers
  Mapping token_ids_;    // int64 [chunk]
  Mapping past_length_;  // int32 [1]
  std::map<std::string, Mapping> hidden_;
  std::vector<Layer> layers_;
  Pass decode_;
  Pass prefill_;
  std::unique_ptr<Binding> head_;  // from the first row of kFinal to logits_
};

}  // namespace meki
