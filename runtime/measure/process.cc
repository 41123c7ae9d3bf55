#include "runtime/measure/process.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>

namespace meki::bench {
namespace {

// The numbers of a file of lines "NAME: NUMBER [unit]"; empty if it cannot be read.
std::map<std::string, uint64_t> fields(const char* path) {
  std::map<std::string, uint64_t> found;
  std::ifstream file(path);
  for (std::string line, name; std::getline(file, line);) {
    std::istringstream words(line);
    uint64_t value = 0;
    if (words >> name >> value) found[name] = value;
  }
  return found;
}

// Resident bytes of all mappings of a file: in smaps a line that ends with its absolute path begins each.
std::optional<uint64_t> resident_of(const std::filesystem::path& path) {
  std::error_code error;
  const std::string name = std::filesystem::weakly_canonical(path, error).string();
  std::ifstream file("/proc/self/smaps");
  if (!file) return std::nullopt;
  uint64_t kilobytes = 0;
  bool its = false;
  for (std::string line; std::getline(file, line);) {
    const bool is_field = std::isupper(static_cast<unsigned char>(line[0])) != 0;  // an address has small letters
    if (!is_field) its = line.substr(std::min(line.find('/'), line.size())) == name;
    if (its && line.starts_with("Rss:")) kilobytes += std::stoull(line.substr(4));
  }
  return kilobytes * 1024;
}

}  // namespace

std::optional<ResidentMemory> resident_memory(const std::optional<std::filesystem::path>& rom) {
  const auto status = fields("/proc/self/status");
  ResidentMemory memory;
  for (const auto& [name, to] : {std::pair("VmRSS:", &memory.resident), std::pair("RssAnon:", &memory.anonymous),
                                 std::pair("RssFile:", &memory.file), std::pair("RssShmem:", &memory.shared),
                                 std::pair("VmHWM:", &memory.peak)}) {
    const auto found = status.find(name);
    if (found == status.end()) return std::nullopt;
    *to = found->second * 1024;
  }
  if (rom) memory.rom = resident_of(*rom);
  return memory;
}

std::optional<uint64_t> storage_bytes() {
  const auto counters = fields("/proc/self/io");
  const auto found = counters.find("read_bytes:");
  return found == counters.end() ? std::nullopt : std::optional(found->second);
}

}  // namespace meki::bench
