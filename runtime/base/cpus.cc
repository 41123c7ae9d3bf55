#include "runtime/base/cpus.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <optional>

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

}  // namespace

int affinity_cpus() {
  cpu_set_t affinity;
  CPU_ZERO(&affinity);
  return ::sched_getaffinity(0, sizeof(affinity), &affinity) == 0 ? CPU_COUNT(&affinity) : 1;
}

int available_cpus(const std::filesystem::path& root, const std::filesystem::path& self) {
  double cpus = affinity_cpus();
  for (const std::filesystem::path& group : control_groups("cpu", root, self)) {
    if (const auto quota = quota_of(group)) cpus = std::min(cpus, *quota);
  }
  return std::max(1, static_cast<int>(cpus));
}

}  // namespace meki
