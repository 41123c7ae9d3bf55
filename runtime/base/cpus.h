#pragma once

#include <filesystem>

#include "runtime/base/control_groups.h"

namespace meki {

// The CPUs that this process may run on, by its affinity. At least 1.
int affinity_cpus();

// How many CPUs this process may keep busy: those of its affinity, and no more than the quotas of its control groups
// and of those above them give (cpu.max of version 2, cpu.cfs_quota_us of version 1). At least 1. A quota is rounded
// down: a thread too many would be stopped for the rest of a period in the middle of a step. `root` and `self` are for
// tests.
int available_cpus(const std::filesystem::path& root = kControlGroups,
                   const std::filesystem::path& self = kOwnControlGroups);

}  // namespace meki
