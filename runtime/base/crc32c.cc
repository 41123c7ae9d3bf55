#include "runtime/base/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define MEKI_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define MEKI_CRC_TARGET  // an option of this file instead: Clang before 16 knows the instruction no other way
#endif

namespace meki {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t index = 0; index < table.size(); ++index) {
    uint32_t crc = index;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78U : 0U);
    table[index] = crc;
  }
  return table;
}

constexpr std::array<uint32_t, 256> kTable = make_table();

#ifdef MEKI_CRC_TARGET

bool has_instruction() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("sse4.2") != 0;
#else
  constexpr unsigned long kHwcapCrc32 = 1UL << 7;
  return (getauxval(AT_HWCAP) & kHwcapCrc32) != 0;
#endif
}

MEKI_CRC_TARGET uint32_t crc32c_instruction(std::span<const std::byte> bytes) {
  const std::byte* at = bytes.data();
  size_t left = bytes.size();
  uint32_t crc = 0xFFFFFFFFU;
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word = 0;
    std::memcpy(&word, at, 8);
#if defined(__x86_64__)
    crc = static_cast<uint32_t>(_mm_crc32_u64(crc, word));
#else
    crc = __crc32cd(crc, word);
#endif
  }
  for (; left > 0; ++at, --left) {
#if defined(__x86_64__)
    crc = _mm_crc32_u8(crc, static_cast<uint8_t>(*at));
#else
    crc = __crc32cb(crc, static_cast<uint8_t>(*at));
#endif
  }
  return ~crc;
}

#endif

}  // namespace

uint32_t crc32c_portable(std::span<const std::byte> bytes) {
  uint32_t crc = 0xFFFFFFFFU;
  for (const std::byte byte : bytes) crc = (crc >> 8) ^ kTable[(crc ^ static_cast<uint32_t>(byte)) & 0xFF];
  return ~crc;
}

uint32_t crc32c(std::span<const std::byte> bytes) {
#ifdef MEKI_CRC_TARGET
  static const bool instruction = has_instruction();
  if (instruction) return crc32c_instruction(bytes);
#endif
  return crc32c_portable(bytes);
}

}  // namespace meki
