#pragma once

// What the targets share. Each is a file with LLVMFuzzerTestOneInput, which returns 0 or ends the process: an input is
// refused with a PackageError or accepted, and any other exception, a failed require(), a sanitizer's report or the
// time limit is a finding.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include "runtime/base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace meki::fuzz {

inline void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "fuzz: required: %s\n", what);
  std::abort();
}

// Whether `work` accepts the input; false after the one error that may refuse it.
template <class Work>
bool accepts(Work&& work) {
  try {
    std::forward<Work>(work)();
    return true;
  } catch (const PackageError& error) {
    require(*error.what() != '\0', "an error that says something");
    return false;
  }
}

// A directory of this process, which goes away when it ends.
class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "meki-fuzz-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make a directory like " + name);
    path_ = name;
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }
  void write(std::string_view name, std::string_view bytes) const {
    std::ofstream file(path_ / name, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) throw std::runtime_error("cannot write " + (path_ / name).string());
  }

 private:
  std::filesystem::path path_;
};

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace meki::fuzz
