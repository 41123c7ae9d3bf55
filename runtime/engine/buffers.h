#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "engine/engine.h"
#include "kernels/kv_cache.h"

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
  int32_t* total_sequence_length() const { return length_.as<int32_t>(); }

  // The shape of one step, and the memory of it that is not here.
  struct Step {
    size_t tokens = 1;
    const float* rows = nullptr;  // [layers, tokens, memory_dim]; null in a dense model
    size_t logit_rows = 1;
    float* logits = nullptr;  // [logit_rows, vocab_size]
  };
  // All stages bound to this memory for steps of one shape; run them in order.
  std::vector<std::unique_ptr<Binding>> bind(const Step& step) const;

  // Bytes of the cache, all layers together, that attention reads after `tokens` tokens.
  size_t cache_bytes(size_t tokens) const { return engine_.manifest().architecture.layers * layout_.bytes(tokens); }
  // Fills positions first .. last - 1 of all layers with pseudo-random keys and values.
  void fill_cache(size_t first, size_t last) const;

 private:
  Tensor input(const std::string& name, const Stage& stage, const Step& step) const;
  Tensor output(const std::string& name, const Step& step) const;
  Tensor cache(const std::string& name, size_t layer) const;
  Tensor hidden(const std::string& name, size_t tokens) const;

  const Engine& engine_;
  const KvLayout layout_;
  size_t layer_bytes_;
  Mapping cache_;  // [layers, layer_bytes_]
  Mapping token_ids_;
  Mapping logit_index_;
  Mapping length_;
  std::map<std::string, Mapping> hidden_;
};

}  // namespace meki
