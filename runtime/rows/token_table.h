#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "runtime/base/file.h"

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
  uint64_t vocab_size = 0;
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
  // Checks every constraint of the format. `path` is for messages. Throws PackageError.
  static RomHeader parse(std::span<const std::byte, kBytes> bytes, const std::filesystem::path& path);
};

// A read-only file of memory rows, one bundle a token. Immutable after construction and thread-safe.
class Rom {
 public:
  // Opens `path` and checks its header and size. Where the file system or the system refuses `access`, falls back to
  // pread: access() tells. Throws PackageError.
  // Every read() takes `delay` longer: slow storage, imitated.
  Rom(const std::filesystem::path& path, RomAccess access, std::chrono::microseconds delay = {});

  const RomHeader& header() const { return header_; }
  RomAccess access() const { return access_; }

  // What read() needs: this many bytes, aligned to kAlignment.
  size_t scratch_bytes() const { return scratch_bytes_; }
  static constexpr size_t kAlignment = 4096;
  // Bytes that one read() asks the system for.
  size_t request_bytes(uint32_t token) const;

  // Asks the kernel to bring the bundle into the page cache; does not wait. token < vocab_size.
  void advise(uint32_t token) const noexcept;
  // Asks the kernel to forget what it has cached of the file, so that the next reads go to storage. Best effort: pages
  // in use elsewhere stay.
  void drop_cache() const noexcept;
  // Reads the bundle of `token` (< vocab_size) into `scratch`, checks it, and returns its scales and rows, which live
  // in `scratch`. Blocks on storage. Throws PackageError if the file shrank, cannot be read, or the checksum is wrong.
  std::span<const std::byte> read(uint32_t token, std::span<std::byte> scratch) const;
  // Widens a bundle that read() returned: row l goes to out[l * layer_stride .. + row_dim), float32.
  void widen(std::span<const std::byte> bundle, float* out, size_t layer_stride) const noexcept;

 private:
  struct Window {  // the part of the file that one read() asks for
    uint64_t offset;
    size_t bytes;
    size_t skip;  // from its begin to the bundle
  };
  Window window(uint32_t token) const noexcept;
  bool use_direct(std::byte* probe) const;
  void will_need(const Window& window) const noexcept;
  size_t copy_mapped(const Window& window, std::byte* out) const noexcept;
  void unmap(const Window& window) const noexcept;
  size_t copy_file(const Window& window, std::byte* out) const;

  std::filesystem::path path_;
  RomAccess access_;
  std::chrono::microseconds delay_;
  File file_;
  Mapping mapping_;
  RomHeader header_;
  size_t scratch_bytes_ = 0;
};

}  // namespace meki
