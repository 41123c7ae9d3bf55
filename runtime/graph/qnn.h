#pragma once

#include <cstdint>
#include <filesystem>

#include "runtime/graph/graph.h"

namespace meki {

struct QnnOptions {
  uint32_t soc_model = 0;           // Qualcomm's number of the chip that the stages are compiled for
  uint32_t htp_arch = 0;            // and of its NPU's architecture
  bool shared_memory = false;       // stages allocate memory that they share with the NPU, where its driver has some
  std::filesystem::path profile{};  // as in GraphOptions
};

// Loads compiled stages (models of EPContext nodes) with the ONNX Runtime library at `onnxruntime` and its QNN provider
// in the library `qnn`, which both stay loaded until the process ends. Throws std::runtime_error if they cannot be
// loaded, are too old, or there is no NPU; the loader throws PackageError for a file that they refuse.
GraphLoader qnn_loader(const std::filesystem::path& onnxruntime, const std::filesystem::path& qnn, QnnOptions options);

// Whether this build of the provider simulates the NPU: on x86-64.
bool qnn_is_simulated();

}  // namespace meki
