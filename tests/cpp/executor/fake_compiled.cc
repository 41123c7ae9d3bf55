#include "tests/cpp/executor/fake_compiled.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <string_view>

#include "runtime/base/error.h"
#include "runtime/executor/compiled.h"
#include "runtime/rows/open_rows.h"

namespace meki::test {
namespace {

constexpr uint32_t kLayers = 3;
constexpr uint32_t kHidden = 5;
constexpr uint32_t kHeads = 2;
constexpr uint32_t kHeadDim = 4;
constexpr uint32_t kSeed = 29;
constexpr int64_t kContext = FakeCompiledModel::kContext;
constexpr const char* kChip = "sm0000";

uint32_t mix(uint32_t state, uint32_t value) {
  state = (state ^ value) * 0x9E3779B1;
  return state ^ state >> 15;
}

// 16 bits as a float, exactly.
float number(uint32_t state) { return static_cast<float>(state & 0xFFFF); }

// What layer `layer` caches for a position whose input is `input`, 10 bits: exact in float16. Keys are kind 0.
uint32_t cached(uint32_t input, uint32_t layer, uint32_t kind, uint32_t head, uint32_t i) {
  return mix(mix(input, layer * 2 + kind), head * kHeadDim + i) & 0x3FF;
}

// An integer up to 1023 as binary16, by its definition: the exponent's bias is 15, 10 bits follow the leading one.
uint16_t half_of(uint32_t integer) {
  if (integer == 0) return 0;
  const int exponent = std::bit_width(integer) - 1;
  return static_cast<uint16_t>(((exponent + 15) << 10) | ((integer << (10 - exponent)) & 0x3FF));
}

float embedding(int64_t token, uint32_t i) { return number(mix(mix(kSeed, static_cast<uint32_t>(token)), i)); }

uint32_t fold(uint32_t state, const float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) state = mix(state, std::bit_cast<uint32_t>(values[i]));
  return state;
}

float logit(const float* final, uint32_t token) {
  return number(mix(fold(kSeed, final, kHidden), token)) / 4096;  // 0 .. 16
}

void require(bool valid, const char* what, std::string_view name = {}) {  // allocates nothing when all is well
  if (!valid) throw std::logic_error("fake compiled graph: " + std::string(name) + what);
}

class FakeBinding final : public Binding {
 public:
  FakeBinding(std::string file, int64_t width, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
              CompiledFault& fault)
      : file_(std::move(file)), width_(width), fault_(fault) {
    for (const Tensor& tensor : inputs) bind_input(tensor);
    for (const Tensor& tensor : outputs) bind_output(tensor);
    require(hidden_out_ != nullptr || logits_ != nullptr, " makes nothing", file_);
  }
  FakeBinding(const FakeBinding&) = delete;
  FakeBinding& operator=(const FakeBinding&) = delete;
  ~FakeBinding() override {
    for (const void* memory : shared_) fault_.misuses += !fault_.shared.contains(memory);
  }

  void run() override {
    if (fault_.refuses_shared && !shared_.empty()) throw PackageError("fake refusal of shared memory");
    if (fault_.on_run) fault_.on_run(file_);
    if (fault_.countdown > 0 && --fault_.countdown == 0) throw std::runtime_error("fake fault");
    if (logits_ != nullptr) {
      for (uint32_t token = 0; token < FakeCompiledModel::kVocab; ++token) logits_[token] = logit(hidden_in_, token);
      if (fault_.nan) logits_[0] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    for (int64_t t = 0; t < width_; ++t) {
      for (uint32_t i = 0; ids_ != nullptr && i < kHidden; ++i) hidden_out_[t * kHidden + i] = embedding(ids_[t], i);
    }
    if (ids_ == nullptr) run_layers();
  }

 private:
  struct Cache {
    const uint16_t* past[2] = {};  // keys and values
    uint16_t* made[2] = {};
  };

  static void expect(const Tensor& tensor, ElementType type, const std::vector<int64_t>& shape) {
    require(tensor.data != nullptr && tensor.type == type && tensor.shape == shape, ": type or shape", tensor.name);
  }
  static uint32_t layer_of(const std::string& name) {
    return static_cast<uint32_t>(std::stoul(name.substr(name.find('.') + 1)));
  }

  void bind_input(const Tensor& tensor) {
    const std::string& name = tensor.name;
    if (tensor.shared) {
      require(fault_.shared.contains(tensor.data), " is not the start of shared memory", name);
      shared_.push_back(tensor.data);
      fault_.shared_inputs[name] = tensor.data;
    }
    if (name == "token_ids") {
      width_ = tensor.shape.at(1);  // of dynamic shape
      expect(tensor, ElementType::int64, {1, width_});
      ids_ = static_cast<const int64_t*>(tensor.data);
    } else if (name == "past_length") {
      expect(tensor, ElementType::int32, {1});
      past_length_ = static_cast<const int32_t*>(tensor.data);
    } else if (name == "rows") {
      row_layers_ = tensor.shape.at(0);
      row_dim_ = tensor.shape.at(2);
      expect(tensor, ElementType::float32, {row_layers_, width_, row_dim_});
      rows_ = static_cast<const float*>(tensor.data);
    } else if (name.starts_with("past_key.")) {
      expect(tensor, ElementType::float16, {kHeads, kHeadDim, kContext});
      caches_[layer_of(name)].past[0] = static_cast<const uint16_t*>(tensor.data);
    } else if (name.starts_with("past_value.")) {
      expect(tensor, ElementType::float16, {kHeads, kContext, kHeadDim});
      caches_[layer_of(name)].past[1] = static_cast<const uint16_t*>(tensor.data);
    } else {
      expect(tensor, ElementType::float32, {1, width_, kHidden});
      hidden_in_ = static_cast<const float*>(tensor.data);
    }
  }

  void bind_output(const Tensor& tensor) {
    const std::string& name = tensor.name;
    if (name == "logits") {
      expect(tensor, ElementType::float32, {1, FakeCompiledModel::kVocab});
      logits_ = static_cast<float*>(tensor.data);
    } else if (name.starts_with("new_key.")) {
      expect(tensor, ElementType::float16, {kHeads, kHeadDim, width_});
      caches_[layer_of(name)].made[0] = static_cast<uint16_t*>(tensor.data);
    } else if (name.starts_with("new_value.")) {
      expect(tensor, ElementType::float16, {kHeads, width_, kHeadDim});
      caches_[layer_of(name)].made[1] = static_cast<uint16_t*>(tensor.data);
    } else {
      expect(tensor, ElementType::float32, {1, width_, kHidden});
      hidden_out_ = static_cast<float*>(tensor.data);
    }
  }

  // Where an element is in a cache of `length` positions.
  static size_t at(uint32_t kind, int64_t length, uint32_t head, int64_t position, uint32_t i) {
    const int64_t keys = (head * kHeadDim + i) * length + position;
    const int64_t values = (head * length + position) * kHeadDim + i;
    return static_cast<size_t>(kind == 0 ? keys : values);
  }

  void run_layers() {
    const int64_t past = *past_length_;
    require(past >= 0 && past < kContext, "past_length");
    uint32_t state = kSeed;
    for (int64_t position = 0; position < kContext; ++position) {
      const uint32_t next = position_state(state, position, kContext, false);
      if (position < past) state = next;  // what is behind was read, too, and must be finite
    }
    for (int64_t t = 0; t < width_; ++t) {
      uint32_t input = fold(kSeed, hidden_in_ + t * kHidden, kHidden);
      for (int64_t layer = 0; layer < row_layers_; ++layer) {
        input = fold(input, rows_ + (layer * width_ + t) * row_dim_, static_cast<size_t>(row_dim_));
      }
      for (auto& [layer, cache] : caches_) {
        for (uint32_t kind = 0; kind < 2; ++kind) {
          for (uint32_t head = 0; head < kHeads; ++head) {
            for (uint32_t i = 0; i < kHeadDim; ++i) {
              const uint16_t half = fault_.infinite ? 0x7C00 : half_of(cached(input, layer, kind, head, i));
              cache.made[kind][at(kind, width_, head, t, i)] = half;
            }
          }
        }
      }
      state = fault_.infinite ? state : position_state(state, t, width_, true);
      for (uint32_t i = 0; i < kHidden; ++i) hidden_out_[t * kHidden + i] = number(mix(state, i));
    }
  }

  uint32_t position_state(uint32_t state, int64_t position, int64_t length, bool made) const {
    for (const auto& [layer, cache] : caches_) {
      for (uint32_t kind = 0; kind < 2; ++kind) {
        for (uint32_t head = 0; head < kHeads; ++head) {
          for (uint32_t i = 0; i < kHeadDim; ++i) {
            const uint16_t* data = made ? cache.made[kind] : cache.past[kind];
            const float value = naive_half(data[at(kind, length, head, position, i)]);
            require(std::isfinite(value), "the cache is not finite");
            state = mix(state, static_cast<uint32_t>(static_cast<int32_t>(value)));
          }
        }
      }
    }
    return state;
  }

  std::string file_;
  int64_t width_;
  CompiledFault& fault_;
  const int64_t* ids_ = nullptr;
  const int32_t* past_length_ = nullptr;
  const float* rows_ = nullptr;
  int64_t row_layers_ = 0;
  int64_t row_dim_ = 0;
  const float* hidden_in_ = nullptr;
  float* hidden_out_ = nullptr;
  float* logits_ = nullptr;
  std::map<uint32_t, Cache> caches_;
  std::vector<const void*> shared_;
};

class FakeCompiledGraph final : public Graph {
 public:
  FakeCompiledGraph(std::string file, int64_t width, FakeCompiledModel::Names names, CompiledFault& fault)
      : file_(std::move(file)), width_(width), names_(std::move(names)), fault_(fault) {}
  FakeCompiledGraph(const FakeCompiledGraph&) = delete;
  FakeCompiledGraph& operator=(const FakeCompiledGraph&) = delete;
  ~FakeCompiledGraph() override {
    for (const auto& [memory, graph] : fault_.shared) fault_.misuses += graph == this;
  }
  const std::vector<std::string>& inputs() const override { return names_.first; }
  const std::vector<std::string>& outputs() const override { return names_.second; }
  std::unique_ptr<Binding> bind(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const override {
    return std::make_unique<FakeBinding>(file_, width_, inputs, outputs, fault_);
  }
  SharedMemory allocate_shared(size_t bytes) const override {
    if (fault_.shared.size() >= fault_.shared_room) return nullptr;
    auto* const memory = new std::byte[bytes]();
    fault_.shared[memory] = this;
    return {memory, [&fault = fault_](std::byte* data) {
              fault.misuses += fault.shared.erase(data) != 1;
              delete[] data;
            }};
  }

 private:
  std::string file_;
  int64_t width_;
  FakeCompiledModel::Names names_;
  CompiledFault& fault_;
};

}  // namespace

FakeCompiledModel::FakeCompiledModel(Kind kind, uint32_t chunk)
    : image_({.vocab_size = kVocab, .layers = kLayers, .row_dim = 11, .row_type = kInt4}, 3) {
  const bool dense = kind == Kind::dense;
  switch (kind) {
    case Kind::three_stages: stages_ = {{0, 1, {}}, {1, 2, LayerRange{0, 2}}, {2, 3, LayerRange{2, 3}}}; break;
    case Kind::two_stages: stages_ = {{0, 1, {}}, {1, 3, LayerRange{0, 3}}}; break;
    case Kind::dense: stages_ = {{0, 2, {}}, {2, 3, {}}}; break;
  }
  manifest_.directory = dir_.path();
  manifest_.architecture = {.vocab_size = kVocab,
                            .layers = kLayers,
                            .hidden = kHidden,
                            .context = 2 * kContext,
                            .kv_caches = {kLayers, {.kv_heads = kHeads, .head_dim = kHeadDim}}};
  if (!dense) {
    manifest_.memory = {.address = "token",
                        .vocab_size = kVocab,
                        .layers = kLayers,
                        .row_dim = image_.shape.row_dim,
                        .file = "memory.rom",
                        .row_type = "int4",
                        .content_id = std::string(RomImage::kContentId)};
    write_file(dir_ / "memory.rom", image_.bytes);
    rows_ = open_rows(manifest_, RomAccess::pread);
  }
  QnnTarget& target = manifest_.qnn[kChip];
  target.directory = dir_.path();
  target.context = kContext;
  target.chunk = chunk;
  target.embed = "embed";
  target.head = "head";
  for (size_t index = 0; index < stages_.size(); ++index) {
    target.decode.push_back({"decode" + std::to_string(index), stages_[index].rows});
    target.prefill.push_back({"prefill" + std::to_string(index), stages_[index].rows});
  }
  engine = std::make_shared<const Engine>(rows_, load(), 1);
}

FakeCompiledModel::Names FakeCompiledModel::names(const std::string& file) const {
  if (file == "embed") return {{"token_ids"}, {"embedding"}};
  if (file == "head") return {{"final"}, {"logits"}};
  const size_t index = static_cast<size_t>(file.back() - '0');
  const auto hidden = [this](size_t after) {
    return after == stages_.size() ? std::string("final") : "hidden" + std::to_string(after);
  };
  Names names = {{"past_length", index == 0 ? "embedding" : hidden(index)}, {hidden(index + 1)}};
  if (stages_[index].rows) names.first.push_back("rows");
  for (uint32_t layer = stages_[index].first; layer < stages_[index].last; ++layer) {
    for (const char* kind : {"key.", "value."}) {
      names.first.push_back("past_" + (kind + std::to_string(layer)));
      names.second.push_back("new_" + (kind + std::to_string(layer)));
    }
  }
  return names;
}

std::shared_ptr<const Backend> FakeCompiledModel::load(
    const std::function<void(const std::string& file, Names&)>& spoil) const {
  const GraphLoader loader = [&](const std::filesystem::path& path) -> std::unique_ptr<Graph> {
    const std::string file = path.filename().string();
    Names declared = names(file);
    if (spoil) spoil(file, declared);
    const int64_t width = file.starts_with("prefill") ? manifest_.qnn.at(kChip).chunk : 1;
    return std::make_unique<FakeCompiledGraph>(file, width, declared, fault);
  };
  return CompiledBackend::load(manifest_, kChip, true, loader, loader);
}

std::vector<float> FakeCompiledModel::logits(std::span<const int64_t> tokens) const {
  std::vector<uint32_t> states(stages_.size(), kSeed);
  std::vector<float> hidden(kHidden);
  for (const int64_t token : tokens) {
    for (uint32_t i = 0; i < kHidden; ++i) hidden[i] = embedding(token, i);
    for (size_t index = 0; index < stages_.size(); ++index) {
      const Layers& stage = stages_[index];
      uint32_t input = fold(kSeed, hidden.data(), kHidden);
      for (uint32_t layer = stage.rows ? stage.rows->first : 0; stage.rows && layer < stage.rows->last; ++layer) {
        for (uint32_t i = 0; i < image_.shape.row_dim; ++i) {
          input = mix(input, std::bit_cast<uint32_t>(image_.value(static_cast<uint64_t>(token), layer, i)));
        }
      }
      for (uint32_t layer = stage.first; layer < stage.last; ++layer) {
        for (uint32_t kind = 0; kind < 2; ++kind) {
          for (uint32_t head = 0; head < kHeads; ++head) {
            for (uint32_t i = 0; i < kHeadDim; ++i) {
              states[index] = mix(states[index], cached(input, layer, kind, head, i));
            }
          }
        }
      }
      for (uint32_t i = 0; i < kHidden; ++i) hidden[i] = number(mix(states[index], i));
    }
  }
  std::vector<float> out;
  for (uint32_t token = 0; token < kVocab; ++token) out.push_back(logit(hidden.data(), token));
  return out;
}

std::vector<int64_t> FakeCompiledModel::greedy(std::vector<int64_t> tokens, size_t count) const {
  std::vector<int64_t> made;
  for (size_t i = 0; i < count; ++i) {
    const std::vector<float> row = logits(tokens);
    made.push_back(std::max_element(row.begin(), row.end()) - row.begin());
    tokens.push_back(made.back());
  }
  return made;
}

void FakeCompiledModel::damage(int64_t token) const {
  const auto id = static_cast<uint64_t>(token);
  const uint8_t bad[] = {static_cast<uint8_t>(~image_.payload(id)[0])};
  patch_file(dir_ / "memory.rom", image_.offset(id), bad);
}

void FakeCompiledModel::repair(int64_t token) const {
  const auto id = static_cast<uint64_t>(token);
  patch_file(dir_ / "memory.rom", image_.offset(id), image_.payload(id));
}

}  // namespace meki::test
