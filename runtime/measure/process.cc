#include "runtime/measure/process.h"

#include <fstream>
#include <limits>
#include <string>
#include <string_view>

namespace meki::bench {
namespace {

// The number after "NAME:" in a file of such lines.
std::optional<uint64_t> field(const char* path, std::string_view name) {
  std::ifstream file(path);
  for (std::string label; file >> label;) {
    uint64_t value = 0;
    if (label == name) return file >> value ? std::optional(value) : std::nullopt;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::nullopt;
}

}  // namespace

std::optional<ResidentMemory> resident_memory() {
  const auto now = field("/proc/self/status", "VmRSS:");
  const auto peak = field("/proc/self/status", "VmHWM:");
  if (!now || !peak) return std::nullopt;
  return ResidentMemory{*now * 1024, *peak * 1024};
}

std::optional<uint64_t> storage_bytes() { return field("/proc/self/io", "read_bytes:"); }

}  // namespace meki::bench
