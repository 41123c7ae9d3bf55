#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/executor/stages.h"
#include "runtime/executor/state.h"
#include "runtime/graph/graph.h"
#include "runtime/package/manifest.h"

namespace meki {

// Keys and values as compiled stages take them, float16: a step reads the whole cache and gives new keys and values,
// which enter it when all of the step has succeeded; so a step that fails, and what is computed for padding, leaves
// nothing behind. The cache always has the stages' full context.
class CompiledKvCache final : public SequenceState {
 public:
  struct Shape {
    std::span<const KvCacheInfo> caches;  // of each layer of the model
    size_t context = 0;
    size_t chunk = 0;  // tokens of the widest step
  };
  // `shares`: of a graph whose device shares memory, that memory; null: ordinary memory. Throws std::runtime_error
  // without memory.
  CompiledKvCache(const Shape& shape, const Graph* shares);

  // Throws PackageError, naming `package`, if what a step of `tokens` tokens has computed is not finite.
  void check_finite(size_t tokens, const std::filesystem::path& package) const;
  void append(size_t tokens) override;
  void truncate(size_t length) override { length_ = length; }
  bool reaches(size_t) const override { return true; }
  std::vector<std::byte> snapshot(size_t length) const override;
  size_t snapshot_bytes(size_t length) const override { return 2 * token_elements() * length * sizeof(uint16_t); }
  void restore(std::span<const std::byte> snapshot, size_t length) override;
  // A step reads all of the cache, whatever is in it.
  size_t bytes(size_t) const override { return readers_bytes_; }
  void append_noise(size_t tokens) override;

  // Of one layer: keys float16 [kv_heads, head_dim, tokens], values [kv_heads, tokens, head_dim]. Those of past tokens
  // have all tokens of the context, new ones the `width` of a step.
  Tensor tensor(const std::string& name, const Io& io, size_t width) const;

 private:
  struct Layer {
    size_t kv_heads = 0;
    size_t head_dim = 0;
    uint16_t* keys = nullptr;
    uint16_t* values = nullptr;
    uint16_t* new_keys = nullptr;
    uint16_t* new_values = nullptr;

    size_t row() const { return kv_heads * head_dim; }
  };

  size_t width(size_t tokens) const { return tokens == 1 ? 1 : chunk_; }
  // Elements of keys, or of values, of a token, all layers together.
  size_t token_elements() const;
  // Calls piece(data, count) for the pieces of the cache that the tokens first .. last - 1 are.
  template <class Piece>
  void for_pieces(size_t first, size_t last, Piece piece) const;

  const size_t context_;
  const size_t chunk_;
  size_t readers_bytes_ = 0;                // of all layers, however many of them have one cache
  Mapping cache_;                           // all tensors of the cache, or, where the NPU shares them,
  std::vector<SharedMemory> shared_cache_;  // each
  Mapping added_;                           // new keys and values of all layers
  std::vector<size_t> index_;               // of each layer of the model, in layers_
  std::vector<Layer> layers_;
};

}  // namespace meki
