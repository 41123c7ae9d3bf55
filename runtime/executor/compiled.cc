#include "runtime/executor/compiled.h"

#include <algorithm>
#include <functional>
#include <set>

#include "runtime/executor/compiled_kv_cache.h"

namespace meki {
namespace {

// The hidden states between embed, the stages and the head.
constexpr const char* kEmbedding = "embedding";
constexpr const char* kFinal = "final";

constexpr size_t kRowBuffers = 2;  // that a session's requests for rows may be in

// All memory is allocated once, and bound before the first step.
class CompiledExecutor final : public Executor {
 public:
  CompiledExecutor(const CompiledBackend& backend, size_t chunk)
      : Executor(backend.manifest().directory, backend.manifest().architecture.vocab_size,
                 std::min(chunk, backend.model().chunk)),
        manifest_(backend.manifest()),
        model_(backend.model()),
        cache_({.caches = manifest_.architecture.kv_caches, .context = model_.context, .chunk = model_.chunk},
               backend.info().shared_memory ? model_.decode.front().graph.get() : nullptr),
        token_ids_(Mapping::zeroed(model_.chunk * sizeof(int64_t))),
        past_length_(Mapping::zeroed(sizeof(int32_t))),
        hidden_(model_.hidden_names, model_.chunk, manifest_.architecture.hidden),
        final_(static_cast<float*>(hidden_.tensor(kFinal, 1).data)),
        decode_{1, bind_embed(1), bound(model_.decode)},
        prefill_{model_.chunk, bind_embed(model_.chunk), bound(model_.prefill)},
        head_(model_.head->bind(
            {hidden_.tensor(kFinal, 1)},
            {{"logits", ElementType::float32, {1, int64_t{manifest_.architecture.vocab_size}}, logits_.data()}})) {}

  size_t width(size_t tokens) const override { return tokens == 1 ? 1 : model_.chunk; }
  SequenceState& state() override { return cache_; }

  void prepare(const Prefetcher* rows) override {
    for (Pass* pass : {&decode_, &prefill_}) {
      for (size_t buffer = 0; buffer < (rows != nullptr ? rows->buffers() : 1); ++buffer) {
        pass->stages.bind({.tokens = pass->width, .rows = rows != nullptr ? rows->rows(buffer) : nullptr});
      }
    }
  }

  uint64_t run(const Step& step) override {
    const size_t tokens = step.tokens.size();
    Pass& pass = tokens == 1 ? decode_ : prefill_;
    int64_t* const ids = token_ids_.as<int64_t>();
    std::fill(std::copy(step.tokens.begin(), step.tokens.end(), ids), ids + pass.width, step.tokens.back());
    *past_length_.as<int32_t>() = static_cast<int32_t>(cache_.length());
    pass.embed->run();
    float* const rows = step.rows != nullptr ? step.rows->rows() : nullptr;
    const uint64_t stall = pass.stages.run({.tokens = pass.width, .rows = rows}, step.rows);
    run_head(step);
    cache_.check_finite(tokens, package_);
    cache_.append(tokens);
    return stall;
  }

 private:
  // The stages for steps of one width.
  struct Pass {
    size_t width;
    std::unique_ptr<Binding> embed;
    BoundStages stages;
  };

  std::unique_ptr<Binding> bind_embed(size_t width) const {
    return model_.embed->bind({{"token_ids", ElementType::int64, {1, static_cast<int64_t>(width)}, token_ids_.data()}},
                              {hidden_.tensor(kEmbedding, width)});
  }

  BoundStages bound(const std::vector<Stage>& stages) const {
    return {kCompiledNames, stages, kRowBuffers, std::bind_front(&CompiledExecutor::tensor, this)};
  }

  Tensor tensor(const std::string& name, Io io, const Stage& stage, const StepShape& shape) const {
    switch (io.kind) {
      case IoKind::past_length: return {name, ElementType::int32, {1}, past_length_.data()};
      case IoKind::rows: return rows_tensor(name, stage, shape, manifest_.memory->row_dim);
      case IoKind::hidden: return hidden_.tensor(name, shape.tokens);
      default: return cache_.tensor(name, io, shape.tokens);
    }
  }

  // The head takes one token at a time, always from the first row of the last hidden states: the rows that are wanted
  // are moved there in ascending order, so none is lost before its turn.
  void run_head(const Step& step) {
    const size_t hidden_size = manifest_.architecture.hidden;
    float* out = step.logits;
    for (size_t token = out != nullptr ? step.logits_from : step.tokens.size() - 1; token < step.tokens.size();
         ++token) {
      if (token > 0) std::copy_n(final_ + token * hidden_size, hidden_size, final_);
      head_->run();
      check_logits(last_logits());
      if (out != nullptr) out = std::copy(last_logits().begin(), last_logits().end(), out);
    }
  }

  const Manifest& manifest_;
  const CompiledModel& model_;
  CompiledKvCache cache_;
  const Mapping token_ids_;    // int64 [chunk]
  const Mapping past_length_;  // int32 [1]
  const HiddenTensors hidden_;
  float* const final_;  // the last hidden states
  Pass decode_;
  Pass prefill_;
  const std::unique_ptr<Binding> head_;  // from the first row of kFinal to logits_
};

std::unique_ptr<Graph> load_one(const GraphLoader& load, const std::filesystem::path& path, const char* input,
                                const char* output) {
  auto graph = load(path);
  const std::vector<std::string> inputs = {input};
  const std::vector<std::string> outputs = {output};
  kCompiledNames.require(graph->inputs() == inputs && graph->outputs() == outputs, path,
                         std::string("expected the one input \"") + input + "\" and the one output \"" + output + "\"");
  return graph;
}

std::shared_ptr<const CompiledModel> load_model(const Manifest& manifest, const QnnTarget& target,
                                                const GraphLoader& cpu, const GraphLoader& qnn) {
  auto model = std::make_shared<CompiledModel>();
  model->context = target.context;
  model->chunk = target.chunk;
  model->embed = load_one(cpu, target.directory / target.embed, "token_ids", kEmbedding);
  std::set<std::string> hidden;
  const auto load = [&](const std::vector<StageInfo>& infos, std::vector<Stage>& stages) {
    for (const StageInfo& info : infos) {
      const std::filesystem::path path = target.directory / info.file;
      stages.push_back({qnn(path), info.rows, path});
    }
    const auto names = check_stages(kCompiledNames, stages, manifest.architecture.kv_caches, {kEmbedding});
    kCompiledNames.require(names.back() == kFinal, stages.back().path,
                           std::string("its last output is not \"") + kFinal + "\"");
    hidden.insert(names.begin(), names.end());
  };
  load(target.decode, model->decode);
  load(target.prefill, model->prefill);
  model->head = load_one(qnn, target.directory / target.head, kFinal, "logits");
  model->hidden_names.assign(hidden.begin(), hidden.end());
  return model;
}

}  // namespace

const StageNames kCompiledNames = {
    .inputs = {{"past_length", IoKind::past_length}, {"rows", IoKind::rows}},
    .outputs = {},
    .states = {{"past_key.", "new_key.", IoKind::keys},
               {"past_value.", "new_value.", IoKind::values},
               {"shared_past_key.", "", IoKind::seen_keys},
               {"shared_past_value.", "", IoKind::seen_values},
               {"shared_new_key.", "", IoKind::seen_new_keys},
               {"shared_new_value.", "", IoKind::seen_new_values}},
    .remedy = "compile the model again",
};

std::shared_ptr<const Backend> CompiledBackend::load(const Manifest& manifest, const std::string& soc, bool simulated,
                                                     const GraphLoader& cpu, const GraphLoader& qnn) {
  auto model = load_model(manifest, manifest.qnn.at(soc), cpu, qnn);
  const BackendInfo info{.provider = Provider::qnn,
                         .kv_type = KvType::float16,
                         .context = model->context,
                         .context_limit = "model is compiled for",
                         .soc = soc,
                         .simulated = simulated,
                         // Whether there is any is known once some is given.
                         .shared_memory = model->decode.front().graph->allocate_shared(1) != nullptr};
  return std::shared_ptr<const Backend>(new CompiledBackend(manifest, info, std::move(model)));
}

std::unique_ptr<Executor> CompiledBackend::executor(size_t, size_t chunk) const {
  return std::make_unique<CompiledExecutor>(*this, chunk);
}

std::shared_ptr<const Backend> CompiledBackend::fallback() const {
  if (!info().shared_memory) return nullptr;
  BackendInfo ordinary = info();
  ordinary.shared_memory = false;
  return std::shared_ptr<const Backend>(new CompiledBackend(manifest(), ordinary, model_));
}

}  // namespace meki
