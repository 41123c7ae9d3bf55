#include "runtime/executor/static_steps.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "runtime/base/checked.h"
#include "runtime/base/error.h"
#include "runtime/base/half.h"

namespace meki {
namespace {

bool is_finite(const uint16_t* halves, size_t count) {
  constexpr uint16_t kExponent = 0x7C00;  // all ones: infinity or NaN
  bool finite = true;
  for (size_t i = 0; i < count; ++i) finite &= (halves[i] & kExponent) != kExponent;
  return finite;
}

// Copies `count` values of each row of `from` (`from_stride` values apart) to `to`.
void copy_rows(const uint16_t* from, size_t from_stride, uint16_t* to, size_t to_stride, size_t rows, size_t count) {
  for (size_t row = 0; row < rows; ++row) {
    std::copy_n(from + row * from_stride, count, to + row * to_stride);
  }
}

// Pseudo-random halves of a normal distribution, by the piece.
class NoisePool {
 public:
  NoisePool() : pool_(65'536) {
    std::normal_distribution<float> normal;
    for (uint16_t& value : pool_) value = float_to_half(normal(random_));
  }
  void fill(uint16_t* out, size_t count) {
    while (count > 0) {
      const size_t first = random_() % (pool_.size() / 2);
      const size_t piece = std::min(count, pool_.size() / 2);
      std::copy_n(pool_.data() + first, piece, out);
      out += piece;
      count -= piece;
    }
  }

 private:
  std::mt19937 random_{1};
  std::vector<uint16_t> pool_;
};

}  // namespace

StaticSteps::StaticSteps(const Engine& engine, bool prefetch)
    : Steps(engine),
      model_(*engine.static_model()),
      kv_heads_(engine.manifest().architecture.kv_heads),
      head_dim_(engine.manifest().architecture.head_dim),
      decode_{.stages = model_.decode, .width = 1, .embed = {}, .buffers = {}},
      prefill_{.stages = model_.prefill, .width = model_.chunk, .embed = {}, .buffers = {}} {
  const Architecture& a = engine.manifest().architecture;
  // Of one token and layer: at most 2^42 bytes, and below 2^31 tokens.
  const uint64_t token_bytes = uint64_t{2} * sizeof(uint16_t) * kv_heads_ * head_dim_;
  const auto bytes = [&](size_t tokens) {
    const auto layer_bytes = checked_mul(token_bytes, tokens);
    return layer_bytes ? checked_mul(*layer_bytes, a.layers) : std::nullopt;
  };
  allocate_cache(bytes(model_.context));
  added_ = allocate(bytes(model_.chunk), "a step of the model");
  for (const std::string& name : model_.hidden_names) {
    hidden_[name] = allocate(checked_mul(model_.chunk * sizeof(float), a.hidden), "a step of the model");
  }
  token_ids_ = Mapping::zeroed(model_.chunk * sizeof(int64_t));
  past_length_ = Mapping::zeroed(sizeof(int32_t));
  const size_t row = kv_heads_ * head_dim_;
  for (size_t layer = 0; layer < a.layers; ++layer) {
    uint16_t* const added = added_.as<uint16_t>() + layer * 2 * row * model_.chunk;
    layers_.push_back({cache(2 * layer), cache(2 * layer + 1), added, added + row * model_.chunk});
  }
  open_rows(model_.chunk, prefetch);
  bind(decode_);
  bind(prefill_);
  head_ = model_.head->bind({hidden(kFinal, 1)},
                            {{"logits", ElementType::float32, {1, int64_t{a.vocab_size}}, logits_.data()}});
}

// Zeros: what lies behind the sequence is masked, but multiplied. Shared memory is for one tensor a piece.
void StaticSteps::allocate_cache(std::optional<uint64_t> bytes) {
  const std::string what = "the KV cache of " + std::to_string(model_.context) + " tokens";
  const size_t tensors = size_t{2} * engine_.manifest().architecture.layers;
  if (model_.shared_memory && bytes) {
    while (shared_cache_.size() < tensors) {
      shared_cache_.push_back(model_.decode.front().graph->allocate_shared(*bytes / tensors));
      if (shared_cache_.back() != nullptr) continue;
      throw std::runtime_error(what + " needs " + std::to_string(*bytes >> 20) +
                               " MiB that the NPU shares, which the system does not give; close other sessions");
    }
  } else {
    cache_ = allocate(bytes, what);
    cache_.prefer_huge_pages();
  }
  cache_bytes_ = *bytes;
}

uint16_t* StaticSteps::cache(size_t tensor) const {
  if (model_.shared_memory) return reinterpret_cast<uint16_t*>(shared_cache_[tensor].get());
  return cache_.as<uint16_t>() + tensor * kv_heads_ * head_dim_ * model_.context;
}

void StaticSteps::request(int slot, std::span<const int32_t> sequence, size_t first) {
  request_rows(slot, sequence, first, sequence.size() - first == 1 ? 1 : model_.chunk);
}

uint64_t StaticSteps::run(const Step& step) {
  const size_t tokens = step.tokens.size();
  const Pass& pass = tokens == 1 ? decode_ : prefill_;
  int64_t* const ids = token_ids_.as<int64_t>();
  std::fill(std::copy(step.tokens.begin(), step.tokens.end(), ids), ids + pass.width, step.tokens.back());
  *past_length_.as<int32_t>() = static_cast<int32_t>(step.past);
  pass.embed->run();
  const uint64_t stall = run_stages(pass.stages, pass.buffers[buffer(step.slot)], step.slot);
  run_head(step);
  check_finite(pass.width, tokens);
  store(pass.width, tokens, step.past);
  return stall;
}

// The head takes one token at a time, always from the first row of the last hidden states: the rows that are wanted are
// moved there in ascending order, so none is lost before its turn.
void StaticSteps::run_head(const Step& step) {
  const size_t hidden_size = engine_.manifest().architecture.hidden;
  float* const states = hidden_.at(kFinal).as<float>();
  float* out = step.all_logits;
  for (size_t token = out != nullptr ? 0 : step.tokens.size() - 1; token < step.tokens.size(); ++token) {
    if (token > 0) std::copy_n(states + token * hidden_size, hidden_size, states);
    head_->run();
    check_logits(last_logits());
    if (out != nullptr) out = std::copy(last_logits().begin(), last_logits().end(), out);
  }
}

// Once in the cache, an infinity would reach every later step: masked weights are 0, and 0 times infinity is NaN.
void StaticSteps::check_finite(size_t width, size_t tokens) const {
  bool finite = true;
  for (const Layer& layer : layers_) {
    for (size_t row = 0; row < kv_heads_ * head_dim_; ++row) finite &= is_finite(layer.new_keys + row * width, tokens);
    for (size_t head = 0; head < kv_heads_; ++head) {
      finite &= is_finite(layer.new_values + head * width * head_dim_, tokens * head_dim_);
    }
  }
  if (finite) return;
  throw PackageError(engine_.manifest().directory.string() +
                     ": the model computed keys or values that are not finite; its weights or memory "
                     "rows are damaged, or exceed float16: convert and compile the model again");
}

void StaticSteps::store(size_t width, size_t tokens, size_t past) const {
  const size_t context = model_.context;
  for (const Layer& layer : layers_) {
    copy_rows(layer.new_keys, width, layer.keys + past, context, kv_heads_ * head_dim_, tokens);
    copy_rows(layer.new_values, width * head_dim_, layer.values + past * head_dim_, context * head_dim_, kv_heads_,
              tokens * head_dim_);
  }
}

void StaticSteps::bind(Pass& pass) const {
  const auto width = static_cast<int64_t>(pass.width);
  pass.embed = model_.embed->bind({{"token_ids", ElementType::int64, {1, width}, token_ids_.data()}},
                                  {hidden(kEmbedding, pass.width)});
  for (size_t buffer = 0; buffer < kSlots; ++buffer) {
    for (const Stage& stage : pass.stages) {
      std::vector<Tensor> inputs;
      std::vector<Tensor> outputs;
      for (const std::string& name : stage.graph->inputs()) inputs.push_back(input(name, stage, pass.width, buffer));
      for (const std::string& name : stage.graph->outputs()) outputs.push_back(output(name, pass.width));
      pass.buffers[buffer].push_back(stage.graph->bind(inputs, outputs));
    }
  }
}

Tensor StaticSteps::input(const std::string& name, const Stage& stage, size_t width, size_t buffer) const {
  const StaticIo io = parse_static_input(name);
  switch (io.kind) {
    case StaticIoKind::past_length: return {name, ElementType::int32, {1}, past_length_.data()};
    case StaticIoKind::rows: {
      const size_t memory_dim = engine_.manifest().architecture.memory_dim;
      return {name,
              ElementType::float32,
              {int64_t{stage.rows->last} - stage.rows->first, static_cast<int64_t>(width),
               static_cast<int64_t>(memory_dim)},
              rows(buffer) + stage.rows->first * width * memory_dim};
    }
    case StaticIoKind::past_key: return cached(keys(name, layers_[io.layer].keys, model_.context));
    case StaticIoKind::past_value: return cached(values(name, layers_[io.layer].values, model_.context));
    default: return hidden(name, width);
  }
}

Tensor StaticSteps::cached(Tensor tensor) const {
  tensor.shared = model_.shared_memory;
  return tensor;
}

Tensor StaticSteps::output(const std::string& name, size_t width) const {
  const StaticIo io = parse_static_output(name);
  switch (io.kind) {
    case StaticIoKind::new_key: return keys(name, layers_[io.layer].new_keys, width);
    case StaticIoKind::new_value: return values(name, layers_[io.layer].new_values, width);
    default: return hidden(name, width);
  }
}

Tensor StaticSteps::keys(const std::string& name, uint16_t* data, size_t tokens) const {
  const auto heads = static_cast<int64_t>(kv_heads_);
  return {name, ElementType::float16, {heads, static_cast<int64_t>(head_dim_), static_cast<int64_t>(tokens)}, data};
}

Tensor StaticSteps::values(const std::string& name, uint16_t* data, size_t tokens) const {
  const auto heads = static_cast<int64_t>(kv_heads_);
  return {name, ElementType::float16, {heads, static_cast<int64_t>(tokens), static_cast<int64_t>(head_dim_)}, data};
}

Tensor StaticSteps::hidden(const std::string& name, size_t width) const {
  return {name,
          ElementType::float32,
          {1, static_cast<int64_t>(width), engine_.manifest().architecture.hidden},
          hidden_.at(name).data()};
}

size_t StaticSteps::cache_bytes(size_t) const { return cache_bytes_; }

void StaticSteps::fill_cache(size_t first, size_t last) {
  NoisePool noise;
  const size_t context = model_.context;
  for (const Layer& layer : layers_) {
    for (size_t row = 0; row < kv_heads_ * head_dim_; ++row) {
      noise.fill(layer.keys + row * context + first, last - first);
    }
    for (size_t head = 0; head < kv_heads_; ++head) {
      noise.fill(layer.values + (head * context + first) * head_dim_, (last - first) * head_dim_);
    }
  }
}

}  // namespace meki
