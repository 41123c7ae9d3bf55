#pragma once

#include <map>
#include <string>
#include <vector>

#include "runtime/executor/steps.h"
#include "runtime/kernels/kv_cache.h"

namespace meki {

// Steps of stages that take any number of tokens and update the KV cache in place. All memory is allocated once; the
// cache takes memory as it fills. What a step of one token is bound to is bound once, otherwise for each step.
class DynamicSteps final : public Steps {
 public:
  DynamicSteps(const Engine& engine, size_t context, size_t chunk, bool prefetch);

  uint64_t run(const Step& step) override;
  size_t cache_bytes(size_t tokens) const override;
  void fill_cache(size_t first, size_t last) override;

 private:
  // The shape of one step, and the memory of it that is not here.
  struct Shape {
    size_t tokens = 1;
    float* rows = nullptr;  // [layers, tokens, memory_dim]; null in a dense model
    size_t logit_rows = 1;
    float* logits = nullptr;  // [logit_rows, vocab_size]
  };

  Bindings bind(const Shape& shape) const;
  Tensor input(const std::string& name, const Stage& stage, const Shape& shape) const;
  Tensor output(const std::string& name, const Shape& shape) const;
  Tensor cache(const std::string& name, size_t layer) const;
  Tensor hidden(const std::string& name, size_t tokens) const;

  const KvLayout layout_;
  size_t layer_bytes_;
  Mapping cache_;        // [layers, layer_bytes_]
  Mapping token_ids_;    // int64 [chunk]
  Mapping logit_index_;  // int64 [chunk]
  Mapping length_;       // int32
  std::map<std::string, Mapping> hidden_;
  Bindings decode_;  // one token, buffer 0
};

}  // namespace meki
