#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace meki::ort {

// Operators, each as "DOMAIN.NAME"; those of ONNX by name alone.
using OperatorNames = std::span<const std::string_view>;

// What graphs on the CPU are made of: what models/graph/ writes for it. None has a graph inside or makes large values
// out of small ones, as Loop and ConstantOfShape do.
extern const OperatorNames kCpuOperators;
// What compiling leaves of a stage.
extern const OperatorNames kCompiledOperators;

// A packed matrix, and where its bytes are. Passive data.
struct PackedTensor {
  std::string name;
  std::string file;
  uint64_t offset = 0;  // bytes
  uint64_t bytes = 0;
};

// What a stage says of itself. Passive data.
struct ModelFile {
  std::filesystem::path path;
  std::set<std::string> files;         // that it refers to by name: those of its tensors and of compiled code
  std::vector<PackedTensor> streamed;  // which a step reads whole: of an embedding alone it reads rows
};

// Looks at a stage before ONNX Runtime does, which would expand any function and compute any constant. Throws
// PackageError, ending with `remedy`, for what no stage has: operators other than `allowed`, functions, graphs or
// tensors in attributes, sparse tensors, more than 16,384 nodes or 64 MiB; and for what is not an ONNX model.
ModelFile check_model_file(const std::filesystem::path& path, OperatorNames allowed, const std::string& remedy);

}  // namespace meki::ort
