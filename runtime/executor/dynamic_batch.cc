// Steps of several sequences through the stages of a DynamicBackend: their tokens are those of one step
// (graph/batch.h).

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/nan.h"
#include "runtime/executor/dynamic.h"
#include "runtime/executor/dynamic_state.h"
#include "runtime/graph/batch.h"
#include "runtime/kernels/convolution.h"

namespace meki {
namespace {

DynamicState& state_of(const BatchMember& member) { return static_cast<DynamicState&>(member.executor->state()); }

class DynamicBatch final : public BatchExecutor {
 public:
  explicit DynamicBatch(const DynamicBackend& backend)
      : backend_(backend),
        layers_(backend.manifest().architecture.kv_caches.size()),
        row_floats_(backend.manifest().memory ? backend.manifest().memory->row_dim : 0),
        row_layers_(backend.manifest().memory ? backend.manifest().memory->layers : 0),
        states_(layers_ + backend.convolutions()),
        memory_(states_.size() * kMost),
        token_ids_(Mapping::zeroed(kMost * sizeof(int64_t))),
        logit_index_(Mapping::zeroed(kMost * sizeof(int64_t))),
        length_(Mapping::zeroed(sizeof(int32_t))),
        rows_(Mapping::zeroed(std::max<size_t>(1, row_layers_ * kMost * row_floats_) * sizeof(float))),
        logits_(Mapping::zeroed(kMost * vocab_size() * sizeof(float))),
        hidden_(backend.hidden_names(), kMost, backend.manifest().architecture.hidden),
        stages_(kDynamicNames, backend.stages(), kMost, std::bind_front(&DynamicBatch::tensor, this)) {
    for (size_t t = 0; t < kMost; ++t) logit_index_.as<int64_t>()[t] = static_cast<int64_t>(t);
  }

  void run(std::span<BatchMember> members) override {
    const size_t tokens = members.size();
    for (size_t t = 0; t < tokens; ++t) begin(members[t], t, tokens);
    *length_.as<int32_t>() = static_cast<int32_t>(tokens);
    const StepShape shape{.tokens = tokens,
                          .rows = row_layers_ > 0 ? rows_.as<float>() : nullptr,
                          .logit_rows = tokens,
                          .logits = logits_.as<float>()};
    bool done = false;
    try {
      const BatchedStep step{std::span(pasts_).first(tokens), states_,
                             std::span(memory_).first(states_.size() * tokens)};
      const BatchedStep::Scope scope(step);
      if (row_layers_ > 0) {
        stages_.run(shape, [this, &members] { return wait(members); });  // two pointers: nothing is allocated for them
      } else {
        stages_.run(shape, nullptr);
      }
      done = true;
    } catch (const PackageError&) {
    } catch (...) {
      for (BatchMember& member : members) state_of(member).clear(1);
      throw;
    }
    for (size_t t = 0; t < tokens; ++t) end(members[t], t, done);
  }

 private:
  size_t vocab_size() const { return backend_.manifest().architecture.vocab_size; }

  // Token t of `tokens`.
  void begin(BatchMember& member, size_t t, size_t tokens) {
    DynamicState& state = state_of(member);
    member.stall = 0;
    member.computed = true;
    token_ids_.as<int64_t>()[t] = member.token;
    pasts_[t] = state.length();
    state.begin(1);
    for (size_t index = 0; index < states_.size(); ++index) {
      memory_[index * tokens + t] =
          index < layers_ ? state.kv_cache().memory(index) : state.convolutions().memory(index - layers_);
    }
  }

  // Whoever's rows do not come gets zeros in their place, and his token does not count.
  uint64_t wait(std::span<BatchMember> members) const {
    for (size_t t = 0; t < members.size(); ++t) {
      BatchMember& member = members[t];
      try {
        member.stall = member.rows->wait();
      } catch (const PackageError&) {
        member.computed = false;
      }
      for (size_t layer = 0; layer < row_layers_; ++layer) {
        float* const to = rows_.as<float>() + (layer * members.size() + t) * row_floats_;
        if (member.computed) {
          std::copy_n(member.rows->rows() + layer * row_floats_, row_floats_, to);
        } else {
          std::fill_n(to, row_floats_, 0.0F);
        }
      }
    }
    return 0;  // each member has its own
  }

  void end(BatchMember& member, size_t t, bool done) const {
    const std::span logits(logits_.as<float>() + t * vocab_size(), vocab_size());
    member.computed = member.computed && done && !has_nan(logits);
    if (!member.computed) {
      state_of(member).clear(1);
      return;
    }
    member.executor->take_logits(logits);
    state_of(member).append(1);
  }

  Tensor tensor(const std::string& name, Io io, const Stage& stage, const StepShape& shape) {
    const Manifest& manifest = backend_.manifest();
    const auto tokens = static_cast<int64_t>(shape.tokens);
    switch (io.kind) {
      case IoKind::token_ids: return {name, ElementType::int64, {1, tokens}, token_ids_.data()};
      case IoKind::total_sequence_length: return {name, ElementType::int32, {}, length_.data()};
      case IoKind::logit_index: return {name, ElementType::int64, {tokens}, logit_index_.data()};
      case IoKind::rows: return rows_tensor(name, stage, shape, manifest.memory->row_dim);
      case IoKind::cache:
      case IoKind::seen_cache: {
        const KvCacheInfo& cache = manifest.architecture.kv_caches[io.layer];
        const KvLayout layout(backend_.info().kv_type, cache.kv_heads, cache.head_dim);
        return {name,
                ElementType::uint8,
                {0, static_cast<int64_t>(layout.kv_heads), static_cast<int64_t>(layout.block_bytes())},
                &states_[io.layer]};
      }
      case IoKind::convolution: {
        const size_t token_bytes = manifest.architecture.hidden * convolution_bytes(backend_.info().kv_type);
        return {name, ElementType::uint8, {0, static_cast<int64_t>(token_bytes)}, &states_[layers_ + io.layer]};
      }
      case IoKind::logits:
        return {name, ElementType::float32, {tokens, manifest.architecture.vocab_size}, shape.logits};
      default: return hidden_.tensor(name, shape.tokens);
    }
  }

  const DynamicBackend& backend_;
  const size_t layers_;
  const size_t row_floats_;  // of one layer
  const size_t row_layers_;
  std::vector<std::byte> states_;             // the layers' caches, then the convolutions': their addresses
  std::vector<std::span<std::byte>> memory_;  // as BatchedStep has it
  std::array<size_t, kMost> pasts_{};
  const Mapping token_ids_;    // int64 [kMost]
  const Mapping logit_index_;  // int64 [kMost]
  const Mapping length_;       // int32
  const Mapping rows_;         // float32 [layers, tokens, row_dim]
  const Mapping logits_;       // float32 [tokens, vocab_size]
  const HiddenTensors hidden_;
  BoundStages stages_;
};

}  // namespace

std::unique_ptr<BatchExecutor> DynamicBackend::batch_executor() const { return std::make_unique<DynamicBatch>(*this); }

}  // namespace meki
