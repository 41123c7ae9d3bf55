#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace meki::bench {

// What Linux tells about this process (proc(5)), in bytes. Passive data.
struct ResidentMemory {
  uint64_t resident = 0;
  uint64_t anonymous = 0;         // of `resident`: heap and caches
  uint64_t file = 0;              // of `resident`: mapped files
  uint64_t shared = 0;            // of `resident`: shared memory
  uint64_t peak = 0;              // the greatest that `resident` ever was
  std::optional<uint64_t> rom{};  // of `file`: the file that was asked for

  uint64_t without_rom() const { return resident - rom.value_or(0); }
};
// rom: the file whose mappings' share is of interest; none: no file's. Nothing where the system does not tell.
std::optional<ResidentMemory> resident_memory(const std::optional<std::filesystem::path>& rom = {});

// Bytes that this process has had fetched from storage so far: what the page cache had is not among them. Nothing where
// the system does not tell.
std::optional<uint64_t> storage_bytes();

}  // namespace meki::bench
