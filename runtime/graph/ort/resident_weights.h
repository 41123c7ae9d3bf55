#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/base/parallel.h"
#include "runtime/graph/ort/library.h"
#include "runtime/graph/ort/model_file.h"

namespace meki::ort {

// The packed matrices of the stages of a package, in memory of their own, of pages of 2 MiB: where ONNX Runtime maps
// them from the file they lie in pages of 4 KiB, and what reads them does so at three quarters of the memory's speed or
// less (docs/results.md). One that several stages have is here once. Thread-safe.
class ResidentWeights {
 public:
  using Place = std::tuple<std::filesystem::path, uint64_t, uint64_t>;  // of a matrix: file, offset, bytes

  explicit ResidentWeights(const Library& library) : library_(library) {}

  // Gives the session that will be made with `options` the matrices of `model` that a step reads whole. They live as
  // long as this. Does nothing where they are better off mapped: the system has no pages of 2 MiB to give, or less
  // memory than would be needed with some to spare, and could not take it back. Throws PackageError.
  void add_to(SessionOptions* options, const ModelFile& model, const Parallel& parallel);

 private:
  using OwnedValue = std::unique_ptr<Value, void (*)(Value*)>;

  // Makes values of matrices; false: they are better off mapped.
  bool load(const std::set<Place>& places, const Parallel& parallel);

  const Library& library_;
  std::mutex mutex_;
  std::vector<Mapping> regions_;  // what the values are made of
  std::map<Place, OwnedValue> values_;
};

}  // namespace meki::ort
