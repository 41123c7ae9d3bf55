#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace meki {

// CRC-32C (Castagnoli, RFC 3720) of `bytes`. Uses the processor's instruction where there is one. Thread-safe.
uint32_t crc32c(std::span<const std::byte> bytes);

// The same from a table, one byte at a time: what crc32c() is tested against and falls back to.
uint32_t crc32c_portable(std::span<const std::byte> bytes);

}  // namespace meki
