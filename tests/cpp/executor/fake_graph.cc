#include "tests/cpp/executor/fake_graph.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "runtime/executor/dynamic.h"
#include "runtime/graph/batch.h"
#include "runtime/kernels/kv_cache.h"
#include "runtime/rows/open_rows.h"

namespace meki::test {
namespace {

constexpr uint32_t kLayers = 3;
constexpr uint32_t kHidden = 5;
constexpr uint32_t kHeads = 2;
constexpr uint32_t kHeadDim = 16;  // the least that a cache takes
constexpr uint32_t kSeed = 17;

uint32_t mix(uint32_t state, uint32_t value) {
  state = (state ^ value) * 0x9E3779B1;
  return state ^ state >> 15;
}

// 16 bits as a float, exactly.
float number(uint32_t state) { return static_cast<float>(state & 0xFFFF); }

// What layer `layer` caches for a position whose input is `input`; keys are kind 0, values 1.
float cached(uint32_t input, uint32_t layer, uint32_t kind, uint32_t head, uint32_t i) {
  return number(mix(mix(input, layer * 2 + kind), head * kHeadDim + i));
}

float logit(uint32_t prefix, uint32_t token) { return number(mix(prefix, token)) / 4096; }  // 0 .. 16

void require(bool valid, const char* what, std::string_view name = {}) {  // allocates nothing when all is well
  if (!valid) throw std::logic_error("fake graph: " + std::string(name) + what);
}

class FakeBinding final : public Binding {
 public:
  FakeBinding(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, Fault* fault) : fault_(fault) {
    std::map<std::string, Tensor> rest;  // outputs that are not used up
    for (const Tensor& tensor : outputs) rest[tensor.name] = tensor;
    const Tensor* ids = nullptr;
    for (const Tensor& tensor : inputs) {
      require(tensor.data != nullptr, " is null", tensor.name);
      if (tensor.name == "token_ids" || tensor.name.starts_with("hidden")) tokens_ = tensor.shape.at(1);
    }
    for (const Tensor& tensor : inputs) {
      const std::string& name = tensor.name;
      if (name == "token_ids") {
        expect(tensor, ElementType::int64, {1, tokens_});
        ids = &tensor;
        token_ids_ = static_cast<const int64_t*>(tensor.data);
      } else if (name == "total_sequence_length") {
        expect(tensor, ElementType::int32, {});
        total_ = static_cast<const int32_t*>(tensor.data);
      } else if (name == "logit_index") {
        logit_rows_ = tensor.shape.at(0);
        expect(tensor, ElementType::int64, {logit_rows_});
        logit_index_ = static_cast<const int64_t*>(tensor.data);
      } else if (name == "rows") {
        row_layers_ = tensor.shape.at(0);
        row_dim_ = tensor.shape.at(2);
        expect(tensor, ElementType::float32, {row_layers_, tokens_, row_dim_});
        rows_ = static_cast<const float*>(tensor.data);
      } else if (name.starts_with("past.")) {
        bind_cache(tensor, rest);
      } else if (name.starts_with("past_convolution.")) {
        expect(tensor, ElementType::uint8, {tensor.shape.at(0), kHidden * sizeof(uint32_t)});
        expect_in_place(tensor, rest);
        seen_ = static_cast<uint32_t*>(tensor.data);
        seen_capacity_ = tensor.shape.at(0);
      } else {
        expect(tensor, ElementType::float32, {1, tokens_, kHidden});
        hidden_in_ = static_cast<const float*>(tensor.data);
      }
    }
    require(total_ != nullptr && (ids != nullptr || hidden_in_ != nullptr), "inputs missing");
    for (const auto& [name, tensor] : rest) {
      if (name == "logits") {
        expect(tensor, ElementType::float32, {logit_rows_, FakeModel::kVocab});
        logits_ = static_cast<float*>(tensor.data);
      } else {
        expect(tensor, ElementType::float32, {1, tokens_, kHidden});
        hidden_out_ = static_cast<float*>(tensor.data);
      }
    }
  }

  void run() override {
    if (fault_ != nullptr && fault_->countdown > 0 && --fault_->countdown == 0) throw std::runtime_error("fake fault");
    const int64_t total = *total_;
    if (fault_ != nullptr && fault_->on_run) fault_->on_run(tokens_, total);
    const BatchedStep* const batch = BatchedStep::current;
    if (batch == nullptr) {
      run_tokens(0, tokens_, total - tokens_);
      return;
    }
    require(total == tokens_ && batch->pasts.size() == static_cast<size_t>(tokens_), "another number of sequences");
    std::array<float*, kLayers> caches{};  // addresses that stand for them
    for (size_t i = 0; i < caches_.size(); ++i) caches[i] = caches_[i].data;
    uint32_t* const seen = seen_;
    for (size_t t = 0; t < batch->pasts.size(); ++t) {  // in turns, as the only sequence there is
      for (size_t i = 0; i < caches_.size(); ++i) {
        const std::span<std::byte> memory = batch->of(reinterpret_cast<std::byte*>(caches[i]))[t];
        caches_[i].data = reinterpret_cast<float*>(memory.data());
        capacity_ = static_cast<int64_t>(memory.size() / (kHeads * 2 * kHeadDim * sizeof(float)));
      }
      if (seen != nullptr) {
        const std::span<std::byte> memory = batch->of(reinterpret_cast<std::byte*>(seen))[t];
        seen_ = reinterpret_cast<uint32_t*>(memory.data());
        seen_capacity_ = static_cast<int64_t>(memory.size() / (kHidden * sizeof(uint32_t)));
      }
      run_tokens(static_cast<int64_t>(t), 1, static_cast<int64_t>(batch->pasts[t]));
    }
    for (size_t i = 0; i < caches_.size(); ++i) caches_[i].data = caches[i];
    seen_ = seen;
  }

  // Tokens from `first` on, which are the positions from `start` on of a sequence.
  void run_tokens(int64_t first, int64_t count, int64_t start) {
    const int64_t total = start + count;
    require(start >= 0 && total <= capacity_, "a step beyond the cache");
    require(seen_ == nullptr || total <= seen_capacity_, "a step beyond the convolution's cache");
    for (int64_t t = 0; t < count; ++t) {
      const uint32_t input = input_of(first + t);
      for (const Cache& cache : caches_) {
        for (uint32_t head = 0; head < kHeads; ++head) {
          for (uint32_t i = 0; i < kHeadDim; ++i) {
            for (uint32_t kind = 0; kind < 2; ++kind) {
              at(cache, kind, head, start + t, i) = cached(input, cache.layer, kind, head, i);
            }
          }
        }
      }
      for (uint32_t i = 0; seen_ != nullptr && i < kHidden; ++i) seen_[(start + t) * kHidden + i] = mix(input, i);
      for (uint32_t i = 0; hidden_out_ != nullptr && i < kHidden; ++i) {
        hidden_out_[(first + t) * kHidden + i] = number(mix(prefix(start + t), i));
      }
    }
    const bool nan = fault_ != nullptr && fault_->nan;
    for (int64_t row = 0; logits_ != nullptr && row < logit_rows_; ++row) {
      require(logit_index_[row] >= 0 && logit_index_[row] < tokens_, "logit_index outside the step");
      const int64_t t = logit_index_[row] - first;
      if (t < 0 || t >= count) continue;
      const uint32_t state = prefix(start + t);
      for (uint32_t token = 0; token < FakeModel::kVocab; ++token) {
        logits_[row * FakeModel::kVocab + token] = nan ? std::numeric_limits<float>::quiet_NaN() : logit(state, token);
      }
    }
  }

 private:
  struct Cache {
    float* data;  // [2, kHeads, capacity, kHeadDim]: what the engine takes for opaque bytes
    uint32_t layer;
  };

  static void expect(const Tensor& tensor, ElementType type, const std::vector<int64_t>& shape) {
    require(tensor.type == type && tensor.shape == shape, " has another type or shape", tensor.name);
  }

  // Takes the output "present..." of an input "past..." from `outputs`.
  static void expect_in_place(const Tensor& tensor, std::map<std::string, Tensor>& outputs) {
    const auto present = outputs.extract("present" + tensor.name.substr(4));
    require(!present.empty() && present.mapped().data == tensor.data && present.mapped().shape == tensor.shape,
            " is not bound to the memory of its output", tensor.name);
  }

  void bind_cache(const Tensor& tensor, std::map<std::string, Tensor>& outputs) {
    constexpr int64_t kBlock = 64;  // positions; what the engine must think a block of a float32 cache to be
    capacity_ = tensor.shape.at(0) * kBlock;
    expect(tensor, ElementType::uint8, {tensor.shape.at(0), kHeads, 2 * kBlock * kHeadDim * sizeof(float)});
    expect_in_place(tensor, outputs);
    const auto layer = static_cast<uint32_t>(std::stoul(tensor.name.substr(5)));
    caches_.push_back({static_cast<float*>(tensor.data), layer});
  }

  float& at(const Cache& cache, uint32_t kind, uint32_t head, int64_t position, uint32_t i) const {
    const KvLayout layout(KvType::float32, kHeads, kHeadDim);
    const auto p = static_cast<size_t>(position);
    float* const block = cache.data + layout.block_offset(head, p) / sizeof(float);
    const size_t slot = p % KvLayout::kBlock;
    if (kind == 0) return block[i * KvLayout::kBlock + slot];
    return block[(KvLayout::kBlock + slot) * kHeadDim + i];
  }

  // What step token `t` brings: its id or hidden vector, and its memory rows.
  uint32_t input_of(int64_t t) const {
    uint32_t state = kSeed;
    if (token_ids_ != nullptr) state = mix(state, static_cast<uint32_t>(token_ids_[t]));
    for (uint32_t i = 0; hidden_in_ != nullptr && i < kHidden; ++i) {
      state = mix(state, static_cast<uint32_t>(hidden_in_[t * kHidden + i]));
    }
    for (int64_t layer = 0; layer < row_layers_; ++layer) {
      for (int64_t i = 0; i < row_dim_; ++i) {
        state = mix(state, std::bit_cast<uint32_t>(rows_[(layer * tokens_ + t) * row_dim_ + i]));
      }
    }
    return state;
  }

  // The caches of positions 0 to `position`, as one number.
  uint32_t prefix(int64_t position) const {
    uint32_t state = kSeed;
    for (int64_t p = 0; p <= position; ++p) {
      for (const Cache& cache : caches_) {
        for (uint32_t kind = 0; kind < 2; ++kind) {
          for (uint32_t head = 0; head < kHeads; ++head) {
            for (uint32_t i = 0; i < kHeadDim; ++i) {
              state = mix(state, static_cast<uint32_t>(at(cache, kind, head, p, i)));
            }
          }
        }
      }
      for (uint32_t i = 0; seen_ != nullptr && i < kHidden; ++i) state = mix(state, seen_[p * kHidden + i]);
    }
    return state;
  }

  Fault* fault_;
  int64_t tokens_ = 0;
  int64_t logit_rows_ = 0;
  int64_t row_layers_ = 0;
  int64_t row_dim_ = 0;
  int64_t capacity_ = 0;
  const int64_t* token_ids_ = nullptr;
  const int32_t* total_ = nullptr;
  const int64_t* logit_index_ = nullptr;
  const float* rows_ = nullptr;
  const float* hidden_in_ = nullptr;
  float* hidden_out_ = nullptr;
  float* logits_ = nullptr;
  std::vector<Cache> caches_;
  uint32_t* seen_ = nullptr;  // of the stage's convolution, [seen_capacity_, kHidden]; null: it has none
  int64_t seen_capacity_ = 0;
};

}  // namespace

std::unique_ptr<Binding> FakeGraph::bind(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
  return std::make_unique<FakeBinding>(inputs, outputs, fault_);
}

FakeModel::FakeModel(Kind kind, std::vector<int32_t> eos_token_ids)
    : image_({.vocab_size = kVocab, .layers = kLayers, .row_dim = 11, .row_type = kInt4}, 3) {
  const bool dense = kind == Kind::dense;
  switch (kind) {
    case Kind::dense: stages_ = {{0, kLayers, false}}; break;
    case Kind::one_stage: stages_ = {{0, kLayers, true}}; break;
    case Kind::two_stages: stages_ = {{0, 1, false}, {1, kLayers, true}}; break;
    case Kind::three_stages: stages_ = {{0, 1, false}, {1, 2, true}, {2, kLayers, true}}; break;
  }
  Manifest manifest;
  manifest.directory = dir_.path();
  manifest.architecture = {.vocab_size = kVocab,
                           .layers = kLayers,
                           .hidden = kHidden,
                           .context = kContext,
                           .kv_caches = {kLayers, {.kv_heads = kHeads, .head_dim = kHeadDim}}};
  manifest.eos_token_ids = std::move(eos_token_ids);
  std::shared_ptr<const RowSource> rows;
  if (!dense) {
    manifest.memory = {.address = "token",
                       .vocab_size = kVocab,
                       .layers = kLayers,
                       .row_dim = image_.shape.row_dim,
                       .file = "memory.rom",
                       .row_type = "int4",
                       .content_id = std::string(RomImage::kContentId)};
    write_file(dir_ / "memory.rom", image_.bytes);
    rows = open_rows(manifest, RomAccess::mmap);
  }
  std::map<std::string, std::pair<std::vector<std::string>, std::vector<std::string>>> graphs;
  size_t convolutions = 0;
  for (size_t index = 0; index < stages_.size(); ++index) {
    const Layers& stage = stages_[index];
    std::vector<std::string> inputs = {"total_sequence_length"};
    std::vector<std::string> outputs;
    inputs.push_back(index == 0 ? "token_ids" : "hidden" + std::to_string(index - 1));
    if (stage.rows) {
      inputs.insert(inputs.end(), {"rows", "past_convolution." + std::to_string(convolutions)});
      outputs.push_back("present_convolution." + std::to_string(convolutions++));
    }
    for (uint32_t layer = stage.first; layer < stage.last; ++layer) {
      inputs.push_back("past." + std::to_string(layer));
      outputs.push_back("present." + std::to_string(layer));
    }
    const bool last = index + 1 == stages_.size();
    if (last) inputs.push_back("logit_index");
    outputs.push_back(last ? "logits" : "hidden" + std::to_string(index));
    const std::string file = "stage" + std::to_string(index);
    manifest.stages.push_back({file, stage.rows ? std::optional(LayerRange{stage.first, stage.last}) : std::nullopt});
    graphs[(manifest.directory / file).string()] = {inputs, outputs};
  }
  const GraphLoader load = [this, &graphs](const std::filesystem::path& path) -> std::unique_ptr<Graph> {
    const auto& [inputs, outputs] = graphs.at(path.string());
    return std::make_unique<FakeGraph>(inputs, outputs, &fault);
  };
  auto backend = std::make_shared<DynamicBackend>(manifest, KvType::float32, load);
  engine = std::make_shared<const Engine>(std::move(rows), std::move(backend), 1);
}

void FakeModel::damage(int64_t token) const {
  const auto id = static_cast<uint64_t>(token);
  const uint8_t bad[] = {static_cast<uint8_t>(~image_.payload(id)[0])};
  patch_file(dir_ / "memory.rom", image_.offset(id), bad);
}

void FakeModel::repair(int64_t token) const {
  const auto id = static_cast<uint64_t>(token);
  patch_file(dir_ / "memory.rom", image_.offset(id), image_.payload(id));
}

std::vector<float> FakeModel::logits(std::span<const int64_t> tokens) const {
  std::vector<uint32_t> prefixes(stages_.size(), kSeed);
  for (const int64_t token : tokens) {
    for (size_t index = 0; index < stages_.size(); ++index) {
      const Layers& stage = stages_[index];
      uint32_t input = kSeed;
      if (index == 0) input = mix(input, static_cast<uint32_t>(token));
      for (uint32_t i = 0; index > 0 && i < kHidden; ++i) input = mix(input, mix(prefixes[index - 1], i) & 0xFFFF);
      for (uint32_t layer = stage.first; stage.rows && layer < stage.last; ++layer) {
        for (uint32_t i = 0; i < image_.shape.row_dim; ++i) {
          input = mix(input, std::bit_cast<uint32_t>(image_.value(static_cast<uint64_t>(token), layer, i)));
        }
      }
      for (uint32_t layer = stage.first; layer < stage.last; ++layer) {
        for (uint32_t kind = 0; kind < 2; ++kind) {
          for (uint32_t head = 0; head < kHeads; ++head) {
            for (uint32_t i = 0; i < kHeadDim; ++i) {
              const float value = cached(input, layer, kind, head, i);
              prefixes[index] = mix(prefixes[index], static_cast<uint32_t>(value));
            }
          }
        }
      }
      for (uint32_t i = 0; stage.rows && i < kHidden; ++i) prefixes[index] = mix(prefixes[index], mix(input, i));
    }
  }
  std::vector<float> out;
  for (uint32_t token = 0; token < kVocab; ++token) out.push_back(logit(prefixes.back(), token));
  return out;
}

std::vector<int64_t> FakeModel::greedy(std::vector<int64_t> tokens, size_t count) const {
  std::vector<int64_t> made;
  for (size_t i = 0; i < count; ++i) {
    const std::vector<float> row = logits(tokens);
    made.push_back(std::max_element(row.begin(), row.end()) - row.begin());
    tokens.push_back(made.back());
  }
  return made;
}

}  // namespace meki::test
