#include "runtime/rows/token_table.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "runtime/base/crc32c.h"
#include "runtime/base/error.h"
#include "runtime/base/half.h"

namespace meki {
namespace {

constexpr std::array<std::string_view, 3> kAccessNames = {"mmap", "pread", "direct"};

inline uint16_t load_u16(const std::byte* at) {
  uint16_t value = 0;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

// What may be resident of a mapped ROM at most, besides copies in flight.
constexpr size_t kMostMapped = size_t{32} << 20;

uint64_t page_bytes() {  // 4 KiB, or 16 on some phones
  static const auto bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

uint64_t round_down(uint64_t value, uint64_t unit) { return value / unit * unit; }
uint64_t round_up(uint64_t value, uint64_t unit) { return round_down(value + unit - 1, unit); }

}  // namespace

std::string_view name_of(RomAccess access) { return kAccessNames.at(static_cast<size_t>(access)); }

RomAccess parse_rom_access(std::string_view name) {
  const auto found = std::find(kAccessNames.begin(), kAccessNames.end(), name);
  if (found == kAccessNames.end()) {
    throw std::invalid_argument("ROM access is \"" + std::string(name) + "\", expected mmap, pread or direct");
  }
  return static_cast<RomAccess>(found - kAccessNames.begin());
}

TokenTable::TokenTable(const std::filesystem::path& path, RomAccess access)
    : path_(path), access_(access), file_(path, O_NONBLOCK) {  // O_NONBLOCK: a FIFO is refused, not waited for
  const uint64_t size = file_.size(path);
  if (size < RomHeader::kBytes) {
    throw PackageError(path.string() + ": " + std::to_string(size) + " bytes, expected at least " +
                       std::to_string(RomHeader::kBytes) + "; the file is truncated: restore it");
  }
  alignas(8) std::byte bytes[RomHeader::kBytes];
  if (file_.read(0, bytes, path) != sizeof(bytes)) {
    throw PackageError(path.string() + ": the file shrank while it was opened");
  }
  header_ = RomHeader::parse(bytes, path);
  if (size != header_.file_bytes) {
    throw PackageError(path.string() + ": " + std::to_string(size) + " bytes, its header says " +
                       std::to_string(header_.file_bytes) + "; the file is truncated or damaged: restore it");
  }
  scratch_bytes_ = round_up(header_.bundle_bytes, RomHeader::kAlignment) + RomHeader::kAlignment;
  ::posix_fadvise(file_.descriptor(), 0, 0, POSIX_FADV_RANDOM);

  // Each special mode proves itself on the first bundle; where the system refuses it, pread serves.
  const Mapping probe = Mapping::zeroed(scratch_bytes_);
  if (access == RomAccess::mmap) {
    mapping_ = Mapping::of_file(file_, header_.file_bytes);
    const Window first = window(0);
    if (mapping_.data() == nullptr || copy_mapped(first, probe.data()) != first.bytes) {
      mapping_ = Mapping();
      access_ = RomAccess::pread;
    } else {
      ::madvise(mapping_.data(), mapping_.size(), MADV_RANDOM);  // default readahead costs milliseconds a bundle
    }
  } else if (access == RomAccess::direct && !use_direct(probe.data())) {
    access_ = RomAccess::pread;
  }
}

// Switches the open file to O_DIRECT if its file system can do that.
bool TokenTable::use_direct(std::byte* probe) const {
  const int descriptor = file_.descriptor();
  const int flags = ::fcntl(descriptor, F_GETFL);
  if (flags < 0 || ::fcntl(descriptor, F_SETFL, flags | O_DIRECT) != 0) return false;
  const Window first = window(0);
  try {
    if (file_.read(first.offset, {probe, first.bytes}, path_) == first.bytes) return true;
  } catch (const PackageError&) {  // EINVAL: the file system accepts the flag but not the read
  }
  ::fcntl(descriptor, F_SETFL, flags);
  return false;
}

TokenTable::Window TokenTable::window(uint64_t index) const noexcept {
  const uint64_t offset = header_.data_offset + index * header_.bundle_stride;
  if (access_ != RomAccess::direct) return {offset, header_.bundle_bytes, 0};
  const uint64_t begin = round_down(offset, RomHeader::kAlignment);
  const uint64_t end = round_up(offset + header_.bundle_bytes, RomHeader::kAlignment);  // within the file
  return {begin, end - begin, offset - begin};
}

void TokenTable::will_need(const Window& window) const noexcept {
  ::posix_fadvise(file_.descriptor(), static_cast<off_t>(window.offset), static_cast<off_t>(window.bytes),
                  POSIX_FADV_WILLNEED);
}

size_t TokenTable::copy_mapped(const Window& window, std::byte* out) const noexcept {
  will_need(window);  // one request for all its pages: the copy would wait for one after the other
  // The kernel copies: a page that lost its file ends the copy here, where a memcpy would die of SIGBUS.
  const iovec to{out, window.bytes};
  const iovec from{mapping_.data() + window.offset, window.bytes};
  ssize_t got = 0;
  do {
    got = ::process_vm_readv(::getpid(), &to, 1, &from, 1, 0);
  } while (got < 0 && errno == EINTR);
  bound_mapped(window);
  return got < 0 ? 0 : static_cast<size_t>(got);
}

// Gives back the pages that copies have mapped before they are too many: left alone, they would add up to a resident
// ROM. They stay in the page cache. With a page the kernel maps its neighbours, as far as the page cache holds them in
// one piece, at most a page table: as many are counted. All go at once, because each time interrupts the other cores.
void TokenTable::bound_mapped(const Window& window) const noexcept {
  const uint64_t table = page_bytes() / sizeof(void*) * page_bytes();  // what one page table maps
  const auto mapped = reinterpret_cast<uintptr_t>(mapping_.data()) + window.offset;
  const size_t reach = round_up(mapped + window.bytes, table) - round_down(mapped, table);
  if (mapped_.fetch_add(reach) + reach >= kMostMapped) unmap();
}

void TokenTable::unmap() const noexcept {
  mapped_ = 0;  // before they are gone: what others map meanwhile counts
  ::madvise(mapping_.data(), mapping_.size(), MADV_DONTNEED);
}

void TokenTable::keys(std::span<const int32_t> sequence, std::span<RowKey> out) const {
  const auto token = static_cast<uint64_t>(sequence.back());
  out.front() = {token < header_.entries ? token : 0, 0, 0};
}

void TokenTable::advise(uint64_t index) const noexcept {
  if (access_ != RomAccess::direct) will_need(window(index));
}

void TokenTable::drop_cache() const noexcept {
  // A page that is mapped cannot be dropped: unmap first.
  if (mapping_.data() != nullptr) unmap();
  ::posix_fadvise(file_.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
}

FetchedPart TokenTable::fetch(uint64_t index, std::span<std::byte> scratch) const {
  const Window wanted = window(index);
  const size_t got = access_ == RomAccess::mmap ? copy_mapped(wanted, scratch.data())
                                                : file_.read(wanted.offset, scratch.first(wanted.bytes), path_);
  if (got != wanted.bytes) {
    throw PackageError(path_.string() + ": bundle " + std::to_string(index) + " gave " + std::to_string(got) + " of " +
                       std::to_string(wanted.bytes) +
                       " bytes; the file shrank or its storage failed: restore it and open the model again");
  }
  const auto bundle = scratch.subspan(wanted.skip, header_.bundle_bytes);
  const auto payload = bundle.first(part_bytes());
  uint32_t expected = 0;
  std::memcpy(&expected, bundle.data() + payload.size(), kChecksumBytes);
  const uint32_t found = crc32c(payload);
  if (found != expected) {
    throw PackageError(path_.string() + ": bundle " + std::to_string(index) + " has checksum " + std::to_string(found) +
                       ", expected " + std::to_string(expected) + "; the file is damaged: restore it");
  }
  return {payload, wanted.bytes};
}

void TokenTable::widen(std::span<const std::byte> bundle, float* out, size_t layer_stride) const noexcept {
  const size_t dim = header_.row_dim;
  const size_t layers = header_.layers;
  if (header_.row_type == RowType::float32) {
    for (size_t layer = 0; layer < layers; ++layer) {
      std::memcpy(out + layer * layer_stride, bundle.data() + layer * dim * sizeof(float), dim * sizeof(float));
    }
    return;
  }
  if (header_.row_type == RowType::float16) {
    for (size_t layer = 0; layer < layers; ++layer) {
      const std::byte* row = bundle.data() + layer * 2 * dim;
      for (size_t i = 0; i < dim; ++i) out[layer * layer_stride + i] = half_to_float(load_u16(row + 2 * i));
    }
    return;
  }
  const size_t group = header_.group;
  const size_t groups = (dim + group - 1) / group;
  const bool nibbles = header_.row_type == RowType::int4;
  const size_t row_bytes = nibbles ? (dim + 1) / 2 : dim;
  const std::byte* rows = bundle.data() + 2 * layers * groups;
  for (size_t layer = 0; layer < layers; ++layer) {
    const std::byte* row = rows + layer * row_bytes;
    float* target = out + layer * layer_stride;
    for (size_t g = 0; g < groups; ++g) {
      const float scale = half_to_float(load_u16(bundle.data() + 2 * (layer * groups + g)));
      const size_t end = std::min(dim, (g + 1) * group);
      for (size_t i = g * group; i < end; ++i) {
        const auto byte = static_cast<uint8_t>(row[nibbles ? i / 2 : i]);
        const int quant = nibbles ? ((byte >> (4 * (i % 2))) & 15) - 8 : static_cast<int8_t>(byte);
        target[i] = scale * static_cast<float>(quant);
      }
    }
  }
}

}  // namespace meki
