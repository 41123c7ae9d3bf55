#include "runtime/executor/dynamic_steps.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "runtime/base/checked.h"
#include "runtime/executor/stage_io.h"

namespace meki {

DynamicSteps::DynamicSteps(const Engine& engine, size_t context, size_t chunk, bool prefetch)
    : Steps(engine),
      layout_(engine.kv_type(), engine.manifest().architecture.kv_heads, engine.manifest().architecture.head_dim),
      // At most 2^20 kv heads, 2^25 blocks and 2^18 bytes a block: no overflow here, but perhaps in the product below.
      layer_bytes_(layout_.bytes(context)) {
  const Architecture& a = engine.manifest().architecture;
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = layer_bytes_ >= 4 * kHugePage;  // else the part-filled pages would outweigh the rest
  if (huge) layer_bytes_ = (layer_bytes_ + kHugePage - 1) / kHugePage * kHugePage;
  cache_ = allocate(checked_mul(layer_bytes_, a.layers), "the KV cache of " + std::to_string(context) + " tokens");
  if (huge) cache_.prefer_huge_pages();
  token_ids_ = Mapping::zeroed(chunk * sizeof(int64_t));
  logit_index_ = Mapping::zeroed(chunk * sizeof(int64_t));
  length_ = Mapping::zeroed(sizeof(int32_t));
  for (const std::string& name : engine.hidden_names()) {
    hidden_[name] = allocate(checked_mul(chunk * sizeof(float), a.hidden), "a step of the model");
  }
  open_rows(chunk, prefetch);
  decode_ = bind({.rows = rows(0), .logits = logits_.as<float>()});
}

uint64_t DynamicSteps::run(const Step& step) {
  const size_t tokens = step.tokens.size();
  const size_t vocab_size = last_logits().size();
  const bool all = step.all_logits != nullptr;
  const Shape shape{.tokens = tokens,
                    .rows = rows(buffer(step.slot)),
                    .logit_rows = all ? tokens : 1,
                    .logits = all ? step.all_logits : logits_.as<float>()};
  std::copy(step.tokens.begin(), step.tokens.end(), token_ids_.as<int64_t>());
  for (size_t row = 0; row < shape.logit_rows; ++row) {
    logit_index_.as<int64_t>()[row] = static_cast<int64_t>(tokens - shape.logit_rows + row);
  }
  *length_.as<int32_t>() = static_cast<int32_t>(step.past + tokens);
  Bindings made;
  const bool bound = tokens == 1 && buffer(step.slot) == 0 && !all;
  if (!bound) made = bind(shape);
  const uint64_t stall = run_stages(engine_.stages(), bound ? decode_ : made, step.slot);
  check_logits({shape.logits, shape.logit_rows * vocab_size});
  if (all) std::memcpy(logits_.data(), step.all_logits + (tokens - 1) * vocab_size, logits_.size());
  return stall;
}

DynamicSteps::Bindings DynamicSteps::bind(const Shape& shape) const {
  Bindings bindings;
  for (const Stage& stage : engine_.stages()) {
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    for (const std::string& name : stage.graph->inputs()) inputs.push_back(input(name, stage, shape));
    for (const std::string& name : stage.graph->outputs()) outputs.push_back(output(name, shape));
    bindings.push_back(stage.graph->bind(inputs, outputs));
  }
  return bindings;
}

Tensor DynamicSteps::input(const std::string& name, const Stage& stage, const Shape& shape) const {
  const Architecture& a = engine_.manifest().architecture;
  const auto tokens = static_cast<int64_t>(shape.tokens);
  const IoName io = parse_input(name);
  switch (io.kind) {
    case IoKind::token_ids: return {name, ElementType::int64, {1, tokens}, token_ids_.data()};
    case IoKind::total_sequence_length: return {name, ElementType::int32, {}, length_.data()};
    case IoKind::logit_index:
      return {name, ElementType::int64, {static_cast<int64_t>(shape.logit_rows)}, logit_index_.data()};
    case IoKind::rows: {
      const size_t skipped = stage.rows->first * shape.tokens * a.memory_dim;
      return {name,
              ElementType::float32,
              {int64_t{stage.rows->last} - stage.rows->first, tokens, a.memory_dim},
              shape.rows + skipped};
    }
    case IoKind::cache: return cache(name, io.layer);
    default: return hidden(name, shape.tokens);
  }
}

Tensor DynamicSteps::output(const std::string& name, const Shape& shape) const {
  const IoName io = parse_output(name);
  switch (io.kind) {
    case IoKind::cache: return cache(name, io.layer);
    case IoKind::logits:
      return {name,
              ElementType::float32,
              {static_cast<int64_t>(shape.logit_rows), engine_.manifest().architecture.vocab_size},
              shape.logits};
    default: return hidden(name, shape.tokens);
  }
}

Tensor DynamicSteps::cache(const std::string& name, size_t layer) const {
  const size_t block = layout_.block_bytes();
  return {name,
          ElementType::uint8,
          {static_cast<int64_t>(layer_bytes_ / layout_.kv_heads / block), static_cast<int64_t>(layout_.kv_heads),
           static_cast<int64_t>(block)},
          cache_.data() + layer * layer_bytes_};
}

Tensor DynamicSteps::hidden(const std::string& name, size_t tokens) const {
  return {name,
          ElementType::float32,
          {1, static_cast<int64_t>(tokens), engine_.manifest().architecture.hidden},
          hidden_.at(name).data()};
}

size_t DynamicSteps::cache_bytes(size_t tokens) const {
  return engine_.manifest().architecture.layers * layout_.bytes(tokens);
}

void DynamicSteps::fill_cache(size_t first, size_t last) {
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
