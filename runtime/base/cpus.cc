#include "runtime/base/cpus.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>

namespace meki {
namespace {

// The CPUs that one group's files give; nothing where there is no limit.
std::optional<double> quota_of(const std::filesystem::path& group) {
  double quota = -1;  // "max" is no number
  double period = 0;
  if (std::ifstream file(group / "cpu.max"); file) {
    file >> quota >> period;
  } else {
    std::ifstream(group / "cpu.cfs_quota_us") >> quota;
    std::ifstream(group / "cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? std::optional(quota / period) : std::nullopt;
}

bool has_cpu(const std::string& controllers) { return ("," + controllers + ",").find(",cpu,") != std::string::npos; }

}  // namespace

int affinity_cpus() {
  cpu_set_t affinity;
  CPU_ZERO(&affinity);
  return ::sched_getaffinity(0, sizeof(affinity), &affinity) == 0 ? CPU_COUNT(&affinity) : 1;
}

int available_cpus(const std::filesystem::path& root, const std::filesystem::path& self) {
  double cpus = affinity_cpus();
  std::ifstream groups(self);
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !has_cpu(controllers)) continue;
    const std::filesystem::path mount = controllers.empty() ? root : root / controllers;
    // A container may see the path that its host has: then its own group is the mount itself.
    for (auto path = std::filesystem::path(line.substr(second + 1)).relative_path();; path = path.parent_path()) {
      if (const auto quota = quota_of(mount / path)) cpus = std::min(cpus, *quota);
      if (path.empty()) break;
    }
  }
  return std::max(1, static_cast<int>(cpus));
}

}  // namespace meki
