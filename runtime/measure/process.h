#pragma once

#include <cstdint>
#include <optional>

namespace meki::bench {

// What Linux tells about this process (proc(5)); nothing where it does not.
struct ResidentMemory {
  uint64_t now = 0;   // bytes
  uint64_t peak = 0;  // bytes, the greatest that it ever was
};
std::optional<ResidentMemory> resident_memory();

// Bytes that this process has had fetched from storage so far: what the page cache had is not among them.
std::optional<uint64_t> storage_bytes();

}  // namespace meki::bench
