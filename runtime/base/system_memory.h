#pragma once

#include <cstdint>
#include <filesystem>

#include "runtime/base/control_groups.h"

namespace meki {

// Whether the system gives pages of 2 MiB to memory that asks for them (Mapping::prefer_huge_pages), by the file in
// which Linux says so.
bool gives_huge_pages(const std::filesystem::path& setting = "/sys/kernel/mm/transparent_hugepage/enabled");

// Bytes that this process may take without anything going to swap, as Linux estimates them, and no more than its
// control groups may have in all (memory.max of version 2, memory.limit_in_bytes of version 1). 0 where Linux does not
// say. The paths are for tests.
uint64_t available_memory(const std::filesystem::path& report = "/proc/meminfo",
                          const std::filesystem::path& root = kControlGroups,
                          const std::filesystem::path& self = kOwnControlGroups);

}  // namespace meki
