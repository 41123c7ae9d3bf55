#pragma once

#include <filesystem>
#include <string_view>
#include <vector>

namespace meki {

// The directories of the control groups that this process belongs to and of those above them, for a `controller` such
// as "cpu": of version 2 and of version 1. `root` is where they are mounted, `self` the list of the process's own.
std::vector<std::filesystem::path> control_groups(std::string_view controller, const std::filesystem::path& root,
                                                  const std::filesystem::path& self);

inline constexpr const char* kControlGroups = "/sys/fs/cgroup";
inline constexpr const char* kOwnControlGroups = "/proc/self/cgroup";

}  // namespace meki
