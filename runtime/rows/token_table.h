#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "runtime/base/file.h"
#include "runtime/rows/row_source.h"

namespace meki {

enum class RowType : uint32_t { float16 = 1, int8 = 2, int4 = 3, float32 = 4 };
std::string_view name_of(RowType type);

// How bundles are read. All three give the same bytes.
enum class RomAccess {
  mmap,    // the page cache through a mapping; the kernel copies, so that a file that shrank is an error, not a signal
  pread,   // the page cache through pread
  direct,  // past the page cache (O_DIRECT)
};
std::string_view name_of(RomAccess access);
// Throws std::invalid_argument for anything but "mmap", "pread" and "direct".
RomAccess parse_rom_access(std::string_view name);

// The fields of a ROM's header (docs/rom-format.md).
struct RomHeader {
  uint64_t entries = 0;
  uint32_t layers = 0;
  uint32_t row_dim = 0;
  RowType row_type = RowType::float16;
  uint32_t group = 0;
  uint64_t bundle_bytes = 0;
  uint64_t bundle_stride = 0;
  uint64_t data_offset = 0;
  uint64_t file_bytes = 0;
  std::string content_id;  // 32 hexadecimal digits

  static constexpr size_t kBytes = 4096;
  static constexpr size_t kAlignment = 4096;  // of the file's size, as O_DIRECT wants it
  // Checks every constraint of the format. `path` is for messages. Throws PackageError.
  static RomHeader parse(std::span<const std::byte, kBytes> bytes, const std::filesystem::path& path);
};

// A ROM file. By itself a bundle is what a token id names, with the token's rows of all layers: a key's index is that
// id, 0 for tokens beyond the table. Who has keys of its own (HashedNgrams) passes any bundle's number as index.
class TokenTable final : public RowSource {
 public:
  // Opens `path` and checks its header and size. Where the file system or the system refuses `access`, falls back to
  // pread: access() tells. Throws PackageError.
  TokenTable(const std::filesystem::path& path, RomAccess access);

  const RomHeader& header() const { return header_; }

  RowShape shape() const override { return {header_.layers, header_.row_dim}; }
  RowShape part() const override { return shape(); }
  size_t keys_per_token() const override { return 1; }
  size_t history() const override { return 0; }
  void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const override;
  size_t part_bytes() const override { return header_.bundle_bytes - kChecksumBytes; }
  size_t scratch_bytes() const override { return scratch_bytes_; }
  void advise(uint64_t index) const noexcept override;
  bool waits() const override { return access_ == RomAccess::direct; }
  // Throws PackageError if the file shrank, cannot be read, or the checksum is wrong.
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override;
  void widen(std::span<const std::byte> bundle, float* out, size_t layer_stride) const noexcept override;
  // Pages in use elsewhere stay cached.
  void drop_cache() const noexcept override;
  std::string_view access() const override { return name_of(access_); }

 private:
  struct Window {  // the part of the file that one fetch() asks for
    uint64_t offset;
    size_t bytes;
    size_t skip;  // from its begin to the bundle
  };
  Window window(uint64_t index) const noexcept;
  bool use_direct(std::byte* probe) const;
  void will_need(const Window& window) const noexcept;
  size_t copy_mapped(const Window& window, std::byte* out) const noexcept;
  void bound_mapped(const Window& window) const noexcept;
  void unmap() const noexcept;

  static constexpr size_t kChecksumBytes = 4;  // behind a bundle's scales and rows

  std::filesystem::path path_;
  RomAccess access_;
  File file_;
  Mapping mapping_;
  mutable std::atomic<size_t> mapped_ = 0;  // bytes of mapping_ that may be resident
  RomHeader header_;
  size_t scratch_bytes_ = 0;
};

}  // namespace meki
