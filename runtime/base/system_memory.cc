#include "runtime/base/system_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace meki {

bool gives_huge_pages(const std::filesystem::path& setting) {
  std::ifstream file(setting);
  for (std::string choice; file >> choice;) {  // the choice that is made stands in brackets
    if (choice == "[always]" || choice == "[madvise]") return true;
  }
  return false;
}

uint64_t available_memory(const std::filesystem::path& report, const std::filesystem::path& root,
                          const std::filesystem::path& self) {
  uint64_t bytes = 0;
  std::ifstream file(report);
  for (std::string name; file >> name; file.ignore(std::numeric_limits<std::streamsize>::max(), '\n')) {
    uint64_t kibibytes = 0;
    if (name == "MemAvailable:" && file >> kibibytes) bytes = kibibytes * 1024;
  }
  for (const std::filesystem::path& group : control_groups("memory", root, self)) {
    for (const char* name : {"memory.max", "memory.limit_in_bytes"}) {
      uint64_t limit = 0;
      if (std::ifstream(group / name) >> limit) bytes = std::min(bytes, limit);  // "max" is no number
    }
  }
  return bytes;
}

}  // namespace meki
