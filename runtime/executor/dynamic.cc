#include "runtime/executor/dynamic.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "runtime/base/error.h"
#include "runtime/executor/dynamic_state.h"
#include "runtime/kernels/convolution.h"

namespace meki {
namespace {

// All memory is allocated once. What steps of the shapes in use are bound to is bound once.
class DynamicExecutor final : public Executor {
 public:
  DynamicExecutor(const DynamicBackend& backend, size_t context, size_t chunk)
      : Executor(backend.manifest().directory, backend.manifest().architecture.vocab_size, chunk),
        backend_(backend),
        state_({backend.info().kv_type, backend.manifest().architecture.kv_caches, context, chunk},
               {backend.convolutions(),
                backend.manifest().architecture.hidden * convolution_bytes(backend.info().kv_type), context}),
        token_ids_(Mapping::zeroed(chunk * sizeof(int64_t))),
        logit_index_(Mapping::zeroed(chunk * sizeof(int64_t))),
        length_(Mapping::zeroed(sizeof(int32_t))),
        hidden_(backend.hidden_names(), chunk, backend.manifest().architecture.hidden),
        stages_(kDynamicNames, backend.stages(), kShapes, std::bind_front(&DynamicExecutor::tensor, this)) {}

  size_t width(size_t tokens) const override { return tokens; }
  SequenceState& state() override { return state_; }

  void prepare(const Prefetcher* rows) override {
    stages_.bind({.rows = rows != nullptr ? rows->rows(0) : nullptr, .logits = logits_.as<float>()});
  }

  uint64_t run(const Step& step) override {
    const size_t tokens = step.tokens.size();
    const size_t vocab_size = last_logits().size();
    const bool wanted = step.logits != nullptr;
    const StepShape shape{.tokens = tokens,
                          .rows = step.rows != nullptr ? step.rows->rows() : nullptr,
                          .logit_rows = wanted ? tokens - step.logits_from : 1,
                          .logits = wanted ? step.logits : logits_.as<float>()};
    std::copy(step.tokens.begin(), step.tokens.end(), token_ids_.as<int64_t>());
    for (size_t row = 0; row < shape.logit_rows; ++row) {
      logit_index_.as<int64_t>()[row] = static_cast<int64_t>(tokens - shape.logit_rows + row);
    }
    *length_.as<int32_t>() = static_cast<int32_t>(state_.length() + tokens);
    state_.begin(tokens);
    uint64_t stall = 0;
    try {
      stall = stages_.run(shape, step.rows);
      check_logits({shape.logits, shape.logit_rows * vocab_size});
    } catch (...) {
      state_.clear(tokens);
      throw;
    }
    if (wanted) std::memcpy(logits_.data(), shape.logits + (shape.logit_rows - 1) * vocab_size, logits_.size());
    state_.append(tokens);
    return stall;
  }

 private:
  Tensor tensor(const std::string& name, Io io, const Stage& stage, const StepShape& shape) const {
    const Manifest& manifest = backend_.manifest();
    const auto tokens = static_cast<int64_t>(shape.tokens);
    const auto logit_rows = static_cast<int64_t>(shape.logit_rows);
    switch (io.kind) {
      case IoKind::token_ids: return {name, ElementType::int64, {1, tokens}, token_ids_.data()};
      case IoKind::total_sequence_length: return {name, ElementType::int32, {}, length_.data()};
      case IoKind::logit_index: return {name, ElementType::int64, {logit_rows}, logit_index_.data()};
      case IoKind::rows: return rows_tensor(name, stage, shape, manifest.memory->row_dim);
      case IoKind::cache:
      case IoKind::seen_cache: return state_.kv_cache().tensor(name, io.layer);
      case IoKind::convolution: return state_.convolutions().tensor(name, io.layer);
      case IoKind::logits:
        return {name, ElementType::float32, {logit_rows, manifest.architecture.vocab_size}, shape.logits};
      default: return hidden_.tensor(name, shape.tokens);
    }
  }

  // One token with either buffer of rows; whole and last chunks of a prompt likewise; logits of several tokens, with a
  // drafter of 2 to 16.
  static constexpr size_t kShapes = 24;

  const DynamicBackend& backend_;
  DynamicState state_;
  const Mapping token_ids_;    // int64 [chunk]
  const Mapping logit_index_;  // int64 [chunk]
  const Mapping length_;       // int32
  const HiddenTensors hidden_;
  BoundStages stages_;
};

}  // namespace

const StageNames kDynamicNames = {
    .inputs = {{"token_ids", IoKind::token_ids},
               {"total_sequence_length", IoKind::total_sequence_length},
               {"rows", IoKind::rows},
               {"logit_index", IoKind::logit_index}},
    .outputs = {{"logits", IoKind::logits}},
    .states = {{"past.", "present.", IoKind::cache},
               {"shared.", "", IoKind::seen_cache},
               {"past_convolution.", "present_convolution.", IoKind::convolution}},
    .remedy = "convert the model again",
};

DynamicBackend::DynamicBackend(const Manifest& manifest, KvType kv_type, const GraphLoader& load)
    : Backend(manifest, {.kv_type = kv_type, .context = manifest.architecture.context}) {
  for (const KvCacheInfo& cache : manifest.architecture.kv_caches) {
    try {
      static_cast<void>(KvLayout(KvType::float32, cache.kv_heads, cache.head_dim));
    } catch (const std::invalid_argument& error) {  // heads that no cache can have are no matter of its type
      throw PackageError((manifest.directory / "manifest.json").string() + ": " + error.what() + "; " +
                         std::string(kDynamicNames.remedy));
    }
    static_cast<void>(KvLayout(kv_type, cache.kv_heads, cache.head_dim));  // checks
  }
  for (const StageInfo& info : manifest.stages) {
    const std::filesystem::path path = manifest.directory / info.file;
    stages_.push_back({load(path), info.rows, path});
  }
  hidden_names_ = check_stages(kDynamicNames, stages_, manifest.architecture.kv_caches);
  convolutions_ = count_states(kDynamicNames, stages_, IoKind::convolution);
}

std::unique_ptr<Executor> DynamicBackend::executor(size_t context, size_t chunk) const {
  return std::make_unique<DynamicExecutor>(*this, context, chunk);
}

}  // namespace meki
