// Parsing and checking a ROM's header: docs/rom-format.md.

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <optional>

#include "runtime/base/checked.h"
#include "runtime/base/crc32c.h"
#include "runtime/base/error.h"
#include "runtime/rows/token_table.h"

namespace meki {
namespace {

static_assert(std::endian::native == std::endian::little, "the file is little-endian and read without swapping");

constexpr char kMagic[8] = {'M', 'E', 'K', 'I', 'R', 'O', 'M', '\n'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kByteOrderMark = 0x01020304;
constexpr uint32_t kGroup = 32;
constexpr uint64_t kStrideUnit = 64;
constexpr uint64_t kSmallStrideUnit = 4;  // of files with many small bundles
constexpr size_t kReservedBegin = 88;
constexpr size_t kChecksumOffset = 4092;

template <class T>
T field(std::span<const std::byte, RomHeader::kBytes> bytes, size_t offset) {
  T value{};
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

class Checker {
 public:
  explicit Checker(const std::filesystem::path& path) : path_(path) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw PackageError(path_.string() + ": " + what + "; convert the model again or restore the file");
  }
  void equal(const char* name, uint64_t got, std::optional<uint64_t> expected) const {
    if (!expected) fail(std::string(name) + " does not fit in 64 bits");
    if (got != *expected) {
      fail(std::string(name) + " is " + std::to_string(got) + ", expected " + std::to_string(*expected));
    }
  }
  void between(const char* name, uint64_t got, uint64_t low, uint64_t high) const {
    if (got < low || got > high) {
      fail(std::string(name) + " is " + std::to_string(got) + ", expected " + std::to_string(low) + " to " +
           std::to_string(high));
    }
  }

 private:
  const std::filesystem::path& path_;
};

struct RowFormat {
  std::string_view name;
  uint32_t bits;  // of a value
};
constexpr RowFormat kRowFormats[] = {{"float16", 16}, {"int8", 8}, {"int4", 4}, {"float32", 32}};  // RowType 1, 2, ...
const RowFormat& format_of(RowType type) { return kRowFormats[static_cast<size_t>(type) - 1]; }

// Values that share a scale, of int8 rows with one scale each; 0: they have none.
uint32_t group_of(RowType type, uint32_t row_dim) {
  if (type == RowType::int8) return row_dim;
  return type == RowType::int4 ? kGroup : 0;
}

std::string hexadecimal(std::span<const std::byte> bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : bytes) {
    text += kDigits[static_cast<uint8_t>(byte) >> 4];
    text += kDigits[static_cast<uint8_t>(byte) & 15];
  }
  return text;
}

}  // namespace

std::string_view name_of(RowType type) { return format_of(type).name; }

RomHeader RomHeader::parse(std::span<const std::byte, kBytes> bytes, const std::filesystem::path& path) {
  const Checker check(path);
  if (std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) check.fail("not a MeKi ROM (wrong magic)");
  check.equal("version", field<uint32_t>(bytes, 8), kVersion);
  check.equal("byte-order mark", field<uint32_t>(bytes, 12), kByteOrderMark);
  check.equal("header checksum", field<uint32_t>(bytes, kChecksumOffset), crc32c(bytes.first<kChecksumOffset>()));

  RomHeader header;
  header.entries = field<uint64_t>(bytes, 16);
  header.layers = field<uint32_t>(bytes, 24);
  header.row_dim = field<uint32_t>(bytes, 28);
  check.between("entries", header.entries, 1, INT32_MAX);
  check.between("layers", header.layers, 1, 65'535);
  check.between("row_dim", header.row_dim, 1, 1'048'576);
  const auto row_type = field<uint32_t>(bytes, 32);
  check.between("row_type", row_type, 1, std::size(kRowFormats));
  header.row_type = static_cast<RowType>(row_type);
  header.group = field<uint32_t>(bytes, 36);
  if (header.row_type != RowType::int8 || header.group != kGroup) {
    check.equal("group", header.group, group_of(header.row_type, header.row_dim));
  }

  header.bundle_bytes = field<uint64_t>(bytes, 40);
  header.bundle_stride = field<uint64_t>(bytes, 48);
  header.data_offset = field<uint64_t>(bytes, 56);
  header.file_bytes = field<uint64_t>(bytes, 64);
  const uint64_t groups = header.group == 0 ? 0 : (header.row_dim + header.group - 1) / header.group;
  // Within the limits above these three fit; the products with the vocabulary are checked.
  const uint64_t row_bytes = (uint64_t{header.row_dim} * format_of(header.row_type).bits + 7) / 8;
  const uint64_t bundle = header.layers * (2 * groups + row_bytes) + 4;
  check.equal("bundle_bytes", header.bundle_bytes, bundle);
  if (header.bundle_stride != checked_round_up(bundle, kSmallStrideUnit)) {
    check.equal("bundle_stride", header.bundle_stride, checked_round_up(bundle, kStrideUnit));
  }
  check.equal("data_offset", header.data_offset, kBytes);
  auto end = checked_mul(header.entries, header.bundle_stride);
  if (end) end = checked_add(*end, header.data_offset);
  if (end) end = checked_round_up(*end, kAlignment);
  check.equal("file_bytes", header.file_bytes, end);

  header.content_id = hexadecimal(std::span<const std::byte>(bytes).subspan(72, 16));
  const auto reserved = std::span<const std::byte>(bytes).subspan(kReservedBegin, kChecksumOffset - kReservedBegin);
  if (std::any_of(reserved.begin(), reserved.end(), [](std::byte byte) { return byte != std::byte{0}; })) {
    check.fail("reserved header bytes are not zero");
  }
  return header;
}

}  // namespace meki
