#include "engine/buffers.h"

#include <new>
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

Buffers::Buffers(const Engine& engine, size_t context, size_t max_tokens) : engine_(engine), context_(context) {
  const Architecture& a = engine.manifest().architecture;
  // kv_heads and head_dim are below 2^21 and context below 2^31, so two products can overflow: both are checked.
  const auto one = checked_mul(uint64_t{a.kv_heads} * a.head_dim, context);
  const auto all = one ? checked_mul(*one, uint64_t{a.layers} * 2 * sizeof(float)) : std::nullopt;
  cache_ = allocate(all, "the KV cache of " + std::to_string(context) + " tokens");
  cache_elements_ = *one;
  token_ids_ = Mapping::zeroed(max_tokens * sizeof(int64_t));
  logit_index_ = Mapping::zeroed(max_tokens * sizeof(int64_t));
  lengths_ = Mapping::zeroed(2 * sizeof(int32_t));
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
    case IoKind::seqlens_k: return {name, ElementType::int32, {1}, seqlens_k()};
    case IoKind::total_sequence_length: return {name, ElementType::int32, {}, total_sequence_length()};
    case IoKind::logit_index: return {name, ElementType::int64, {static_cast<int64_t>(step.logit_rows)}, logit_index()};
    case IoKind::rows: {
      const size_t skipped = stage.rows->first * step.tokens * a.memory_dim;
      return {name,
              ElementType::float32,
              {int64_t{stage.rows->last} - stage.rows->first, tokens, a.memory_dim},
              const_cast<float*>(step.rows) + skipped};  // inputs are only read
    }
    case IoKind::key: return cache(name, size_t{2} * io.layer);
    case IoKind::value: return cache(name, size_t{2} * io.layer + 1);
    default: return hidden(name, step.tokens);
  }
}

Tensor Buffers::output(const std::string& name, const Step& step) const {
  const IoName io = parse_output(name);
  switch (io.kind) {
    case IoKind::key: return cache(name, size_t{2} * io.layer);
    case IoKind::value: return cache(name, size_t{2} * io.layer + 1);
    case IoKind::logits:
      return {name,
              ElementType::float32,
              {static_cast<int64_t>(step.logit_rows), engine_.manifest().architecture.vocab_size},
              step.logits};
    default: return hidden(name, step.tokens);
  }
}

Tensor Buffers::cache(const std::string& name, size_t index) const {
  const Architecture& a = engine_.manifest().architecture;
  return {name,
          ElementType::float32,
          {1, a.kv_heads, static_cast<int64_t>(context_), a.head_dim},
          cache_.as<float>() + index * cache_elements_};
}

Tensor Buffers::hidden(const std::string& name, size_t tokens) const {
  return {name,
          ElementType::float32,
          {1, static_cast<int64_t>(tokens), engine_.manifest().architecture.hidden},
          hidden_.at(name).data()};
}

}  // namespace meki
