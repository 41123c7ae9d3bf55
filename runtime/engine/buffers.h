#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "engine/engine.h"

namespace meki {

// The memory that one session's stages read and write: step inputs, tensors between stages and the KV cache. Allocated
// once; the cache takes memory as it fills.
class Buffers {
 public:
  // For `context` tokens of KV cache and steps of up to `max_tokens` tokens. Throws std::runtime_error if the system
  // does not give the memory.
  Buffers(const Engine& engine, size_t context, size_t max_tokens);

  int64_t* token_ids() const { return token_ids_.as<int64_t>(); }      // [max_tokens]
  int64_t* logit_index() const { return logit_index_.as<int64_t>(); }  // [max_tokens]
  int32_t* seqlens_k() const { return lengths_.as<int32_t>(); }        // [1]
  int32_t* total_sequence_length() const { return lengths_.as<int32_t>() + 1; }

  // The shape of one step, and the memory of it that is not here.
  struct Step {
    size_t tokens = 1;
    const float* rows = nullptr;  // [layers, tokens, memory_dim]; null in a dense model
    size_t logit_rows = 1;
    float* logits = nullptr;  // [logit_rows, vocab_size]
  };
  // All stages bound to this memory for steps of one shape; run them in order.
  std::vector<std::unique_ptr<Binding>> bind(const Step& step) const;

 private:
  Tensor input(const std::string& name, const Stage& stage, const Step& step) const;
  Tensor output(const std::string& name, const Step& step) const;
  Tensor cache(const std::string& name, size_t index) const;
  Tensor hidden(const std::string& name, size_t tokens) const;

  const Engine& engine_;
  size_t context_;
  size_t cache_elements_;  // of one layer's keys or values
  Mapping cache_;          // [layers, 2, kv_heads, context, head_dim]
  Mapping token_ids_;
  Mapping logit_index_;
  Mapping lengths_;
  std::map<std::string, Mapping> hidden_;
};

}  // namespace meki
