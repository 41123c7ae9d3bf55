// runtime/rows/token_table.h: any bytes as a ROM, as they are and with checksums made right.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "fuzz/target.h"
#include "runtime/base/crc32c.h"
#include "runtime/base/file.h"
#include "runtime/rows/token_table.h"

namespace meki::fuzz {
namespace {

// What the hot path trusts, in arithmetic that cannot overflow.
void check_header(const RomHeader& header) {
  __extension__ using Wide = unsigned __int128;
  require(header.entries >= 1 && header.layers >= 1 && header.row_dim >= 1, "nothing is empty");
  require(header.bundle_bytes <= header.bundle_stride, "a bundle fits its place");
  require(Wide{header.data_offset} + Wide{header.entries} * header.bundle_stride <= header.file_bytes,
          "all bundles lie in the file");
}

// The file of a descriptor, of which no name exists in any directory.
class MemoryFile {
 public:
  MemoryFile() : descriptor_(::memfd_create("rom", MFD_CLOEXEC)) {
    require(descriptor_ >= 0, "memory for a file");
    path_ = "/proc/self/fd/" + std::to_string(descriptor_);
  }
  void write(std::span<const uint8_t> bytes) const {
    require(::ftruncate(descriptor_, 0) == 0 &&
                ::pwrite(descriptor_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
            "a file of this size");
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  int descriptor_;
  std::filesystem::path path_;
};

void read_rom(const std::filesystem::path& path, RomAccess access, bool sealed) {
  const TokenTable table(path, access);
  const RomHeader& header = table.header();
  check_header(header);
  const Mapping scratch = Mapping::zeroed(table.scratch_bytes());
  std::vector<float> rows(size_t{header.layers} * header.row_dim);
  for (const uint64_t token : {uint64_t{0}, header.entries / 2, header.entries - 1}) {
    table.advise(token);
    const bool good =
        accepts([&] { table.read(token, {scratch.data(), scratch.size()}, rows.data(), header.row_dim); });
    require(good || token != 0 || !sealed, "a bundle with the right checksum can be read");
  }
}

void open_rom(std::span<const uint8_t> bytes, bool sealed) {
  static const MemoryFile file;
  file.write(bytes);
  for (const RomAccess access : {RomAccess::pread, RomAccess::mmap}) {
    accepts([&] { read_rom(file.path(), access, sealed); });
  }
}

void seal(std::span<uint8_t> bytes) {
  const size_t end = bytes.size() - sizeof(uint32_t);
  const uint32_t checksum = crc32c(std::as_bytes(bytes.first(end)));
  std::memcpy(&bytes[end], &checksum, sizeof(checksum));
}

// The input is a header's fields and the first bytes of the first bundle; checksums and the file's size are made right.
void open_sealed(std::span<const uint8_t> input) {
  constexpr size_t kFields = 96;  // some reserved bytes among them
  constexpr uint64_t kMaxFile = 1 << 20;
  std::vector<uint8_t> bytes(RomHeader::kBytes);
  const auto fields = input.first(std::min(kFields, input.size()));
  std::copy(fields.begin(), fields.end(), bytes.begin());
  seal(bytes);
  RomHeader header;
  const auto head = std::as_bytes(std::span(bytes)).first<RomHeader::kBytes>();
  if (!accepts([&] { header = RomHeader::parse(head, "input"); })) return;
  check_header(header);
  if (header.file_bytes > kMaxFile) return;
  bytes.resize(header.file_bytes);
  const auto bundle = std::span(bytes).subspan(header.data_offset, header.bundle_bytes);
  const auto content = input.subspan(fields.size());
  std::copy_n(content.begin(), std::min(content.size(), bundle.size()), bundle.begin());
  seal(bundle);
  open_rom(bytes, true);
}

}  // namespace
}  // namespace meki::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  meki::fuzz::open_rom({data, size}, false);
  meki::fuzz::open_sealed({data, size});
  return 0;
}
