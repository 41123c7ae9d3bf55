#pragma once

#include <stdexcept>

namespace meki {

// A package, or a file of one, that cannot be used: missing, damaged, inconsistent, or changed while in use.
// The message names the file, what was found, what was expected, and the remedy.
// Bad arguments are std::invalid_argument; a failure of the system or of ONNX Runtime is std::runtime_error.
class PackageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace meki
