#include "runtime/executor/executor.h"

#include <utility>

#include "runtime/base/error.h"
#include "runtime/base/nan.h"

namespace meki {

Executor::Executor(std::filesystem::path package, size_t vocab_size, size_t chunk)
    : package_(std::move(package)),
      // Pages that nobody writes take no memory: a vocabulary that no stage confirms costs nothing.
      logits_(Mapping::zeroed(vocab_size * sizeof(float))),
      chunk_(chunk) {}

void Executor::check_logits(std::span<const float> logits) const {
  if (!has_nan(logits)) return;
  throw PackageError(package_.string() +
                     ": the model computed NaN; its weights or memory rows are damaged: convert the model again");
}

}  // namespace meki
