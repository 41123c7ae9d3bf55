#include "runtime/executor/steps.h"

#include <new>
#include <stdexcept>

#include "runtime/base/error.h"
#include "runtime/engine/sampler.h"
#include "runtime/executor/dynamic_steps.h"
#include "runtime/executor/static_steps.h"

namespace meki {

Steps::Steps(const Engine& engine)
    : engine_(engine),
      // Pages that nobody writes take no memory: a vocabulary that no stage confirms costs nothing.
      logits_(Mapping::zeroed(engine.manifest().architecture.vocab_size * sizeof(float))) {}

void Steps::open_rows(size_t max_tokens, bool prefetch) {
  if (engine_.rows() == nullptr) return;
  prefetcher_ = std::make_unique<Prefetcher>(engine_.rows(), max_tokens, kSlots, prefetch);
}

void Steps::request(int slot, std::span<const int32_t> sequence, size_t first) {
  request_rows(slot, sequence, first, sequence.size() - first);
}

void Steps::request_rows(int slot, std::span<const int32_t> sequence, size_t first, size_t width) {
  if (!has_rows()) return;
  RowRequest& held = requests_[static_cast<size_t>(slot)];
  held = {};  // before another takes its buffer
  held = prefetcher_->request(sequence, first, width);
}

uint64_t Steps::run_stages(const std::vector<Stage>& stages, const Bindings& bindings, int slot) {
  uint64_t stall = 0;
  bool waiting = has_rows();
  for (size_t index = 0; index < bindings.size(); ++index) {
    if (waiting && stages[index].rows) {
      stall = requests_[static_cast<size_t>(slot)].wait();
      waiting = false;
    }
    bindings[index]->run();
  }
  if (waiting) requests_[static_cast<size_t>(slot)].wait();  // no stage took rows: end the request all the same
  return stall;
}

void Steps::check_logits(std::span<const float> logits) const {
  if (!has_nan(logits)) return;
  throw PackageError(engine_.manifest().directory.string() +
                     ": the model computed NaN; its weights or memory rows are damaged: convert the model again");
}

std::unique_ptr<Steps> make_steps(const Engine& engine, size_t context, size_t chunk, bool prefetch) {
  if (engine.static_model() != nullptr) return std::make_unique<StaticSteps>(engine, prefetch);
  return std::make_unique<DynamicSteps>(engine, context, chunk, prefetch);
}

Mapping allocate(std::optional<uint64_t> bytes, const std::string& what) {
  try {
    if (bytes) return Mapping::zeroed(*bytes);
  } catch (const std::bad_alloc&) {
  }
  throw std::runtime_error(what + " needs " + (bytes ? std::to_string(*bytes >> 20) + " MiB" : "too much memory") +
                           ", which the system does not give; choose a smaller context");
}

}  // namespace meki
