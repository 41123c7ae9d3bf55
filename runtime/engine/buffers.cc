#include "engine/buffers.h"

#include <new>
#include <random>
#include <stdexcept>

#include "base/checked.h"
#include "engine/stage_io.h"

namespace meki {
namespace {

Mapping allocate(std::optional<uint64_t> bytes, const std::string& what) {
  try {
    if (bytes) return Mapping::zeroed(*bytes);
  } catch (const std::bad_alloc&) {
  }
  throw std::runtime_error(what + " needs " + (bytes ? std::to_string(*bytes >> 20) + " MiB" : "too much memory") +
                           ", which the system does not give; choose a smaller context");
}

}  // namespace

Buffers::Buffers(const Engine& engine, size_t context, size_t max_tokens)
    : engine_(engine),
      layout_(engine.kv_type(), engine.manifest().architecture.kv_heads, engine.manifest().architecture.head_dim),
      // At most 2^20 kv heads, 2^25 blocks and 2^18 bytes a block: no overflow here, but perhaps in the product below.
      layer_bytes_(layout_.bytes(context)) {
  const Architecture& a = engine.manifest().architecture;
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = layer_bytes_ >= 4 * kHugePage;  // else the part-filled pages would outweigh the rest
  if (huge) layer_bytes_ = (layer_bytes_ + kHugePage - 1) / kHugePage * kHugePage;
  cache_ = allocate(checked_mul(layer_bytes_, a.layers), "the KV cache of " + std::to_string(context) + " tokens");
  if (huge) cache_.prefer_huge_pages();
  token_ids_ = Mapping::zeroed(max_tokens * sizeof(int64_t));
  logit_index_ = Mapping::zeroed(max_tokens * sizeof(int64_t));
  length_ = Mapping::zeroed(sizeof(int32_t));
  for (const std::string& name : engine.hidden_names()) {
    hidden_[name] = allocate(checked_mul(max_tokens * sizeof(float), a.hidden), "a step of the model");
  }
}

std::vector<std::unique_ptr<Binding>> Buffers::bind(const Step& step) const {
  std::vector<std::unique_ptr<Binding>> bindings;
  for (const Stage& stage : engine_.stages()) {
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    for (const std::string& name : stage.graph->inputs()) inputs.push_back(input(name, stage, step));
    for (const std::string& name : stage.graph->outputs()) outputs.push_back(output(name, step));
    bindings.push_back(stage.graph->bind(inputs, outputs));
  }
  return bindings;
}

Tensor Buffers::input(const std::string& name, const Stage& stage, const Step& step) const {
  const Architecture& a = engine_.manifest().architecture;
  const auto tokens = static_cast<int64_t>(step.tokens);
  const IoName io = parse_input(name);
  switch (io.kind) {
    case IoKind::token_ids: return {name, ElementType::int64, {1, tokens}, token_ids()};
    case IoKind::total_sequence_length: return {name, ElementType::int32, {}, total_sequence_length()};
    case IoKind::logit_index: return {name, ElementType::int64, {static_cast<int64_t>(step.logit_rows)}, logit_index()};
    case IoKind::rows: {
      const size_t skipped = stage.rows->first * step.tokens * a.memory_dim;
      return {name,
              ElementType::float32,
              {int64_t{stage.rows->last} - stage.rows->first, tokens, a.memory_dim},
              const_cast<float*>(step.rows) + skipped};  // inputs are only read
    }
    case IoKind::cache: return cache(name, io.layer);
    default: return hidden(name, step.tokens);
  }
}

Tensor Buffers::output(const std::string& name, const Step& step) const {
  const IoName io = parse_output(name);
  switch (io.kind) {
    case IoKind::cache: return cache(name, io.layer);
    case IoKind::logits:
      return {name,
              ElementType::float32,
              {static_cast<int64_t>(step.logit_rows), engine_.manifest().architecture.vocab_size},
              step.logits};
    default: return hidden(name, step.tokens);
  }
}

Tensor Buffers::cache(const std::string& name, size_t layer) const {
  const size_t block = layout_.block_bytes();
  return {name,
          ElementType::uint8,
          {static_cast<int64_t>(layer_bytes_ / layout_.kv_heads / block), static_cast<int64_t>(layout_.kv_heads),
           static_cast<int64_t>(block)},
          cache_.data() + layer * layer_bytes_};
}

Tensor Buffers::hidden(const std::string& name, size_t tokens) const {
  return {name,
          ElementType::float32,
          {1, static_cast<int64_t>(tokens), engine_.manifest().architecture.hidden},
          hidden_.at(name).data()};
}

void Buffers::fill_cache(size_t first, size_t last) const {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> pool(8191 + layout_.head_dim);
  for (float& value : pool) value = normal(random);
  const auto row = [&] { return pool.data() + random() % 8191; };
  for (size_t layer = 0; layer < engine_.manifest().architecture.layers; ++layer) {
    std::byte* const cache = cache_.data() + layer * layer_bytes_;
    for (size_t position = first; position < last; ++position) {
      for (size_t head = 0; head < layout_.kv_heads; ++head) {
        append(layout_, cache + layout_.block_offset(head, position), position % KvLayout::kBlock, row(), row());
      }
    }
  }
}

}  // namespace meki
