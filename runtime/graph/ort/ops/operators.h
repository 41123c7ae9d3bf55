#pragma once

#include <cstddef>
#include <memory>

#include "runtime/base/parallel.h"
#include "runtime/graph/ort/api.h"
#include "runtime/kernels/kv_cache.h"

namespace meki {

// Our own operators for ONNX Runtime's CPU provider, domain "meki" (docs/package-format.md, "Operators"): Attention,
// for one type of KV cache, ShortConvolution, Linear, Embedding, Experts and Injection. They have `threads` threads of
// their own, the caller's included, which all sessions with these operators share: with them decode is 1.5 to 1.75
// times as fast as with those that ONNX Runtime lends to operators (docs/architecture.md, "Threads"). Must outlive
// those sessions. Immutable and thread-safe.
class OrtOperators {
 public:
  // Throws std::runtime_error, or std::system_error if the system gives no threads.
  OrtOperators(const ort::Api& api, KvType kv_type, size_t threads);
  ~OrtOperators();
  OrtOperators(const OrtOperators&) = delete;
  OrtOperators& operator=(const OrtOperators&) = delete;

  // Makes them known to the session that will be created with `options`. Throws std::runtime_error.
  void add_to(ort::SessionOptions* options) const;

  // Their threads, for other work.
  Parallel parallel() const;

 private:
  struct Domain;
  std::unique_ptr<Domain> domain_;
};

}  // namespace meki
