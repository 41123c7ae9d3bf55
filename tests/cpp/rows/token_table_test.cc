// runtime/rows/token_table: the header, reading and widening, against docs/rom-format.md.

#include "runtime/rows/token_table.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <thread>

#include "runtime/base/error.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::AlignedBuffer;
using test::check_names;
using test::error_of;
using test::kFloat16;
using test::kFloat32;
using test::kInt4;
using test::kInt8;
using test::RomImage;
using test::RomShape;
using test::TempDir;

constexpr RomAccess kAccesses[] = {RomAccess::mmap, RomAccess::pread, RomAccess::direct};
struct RowFormat {
  uint32_t type;
  uint32_t group = 0;  // as in RomShape
};
constexpr RowFormat kRowFormats[] = {{kFloat16}, {kInt8}, {kInt8, 32}, {kInt4}, {kFloat32}};
constexpr uint64_t kStrideUnits[] = {64, 4};

RomHeader parse(const RomImage& image) {
  return RomHeader::parse(std::as_bytes(std::span(image.bytes)).first<RomHeader::kBytes>(), "some.rom");
}

// Opens with `access`; says so when the machine cannot, because the test then covers pread once more.
std::unique_ptr<TokenTable> open(const std::filesystem::path& path, RomAccess access) {
  auto rom = std::make_unique<TokenTable>(path, access);
  if (rom->access() != name_of(access)) {
    CHECK(rom->access() == "pread");
    MESSAGE("this machine refuses " << name_of(access) << " for " << path.string());
  }
  return rom;
}

bool same_bytes(std::span<const std::byte> got, std::span<const uint8_t> expected) {
  const auto other = std::as_bytes(expected);
  return std::equal(got.begin(), got.end(), other.begin(), other.end());
}

TEST_CASE("rom header: the fields of a valid one") {
  for (const RowFormat& format : kRowFormats) {
    for (const uint64_t unit : kStrideUnits) {
      const RomImage image(
          {.vocab_size = 5, .layers = 3, .row_dim = 33, .row_type = format.type, .group = format.group}, 1, unit);
      const RomHeader header = parse(image);
      CHECK(header.entries == 5);
      CHECK(header.layers == 3);
      CHECK(header.row_dim == 33);
      CHECK(static_cast<uint32_t>(header.row_type) == format.type);
      CHECK(header.group == image.group);
      CHECK(header.bundle_bytes == image.bundle_bytes);
      CHECK(header.bundle_stride == image.stride);
      CHECK(header.data_offset == 4096);
      CHECK(header.file_bytes == image.bytes.size());
      CHECK(header.content_id == RomImage::kContentId);
    }
  }
}

TEST_CASE("rom header: a change of any byte is noticed") {
  RomImage image({.vocab_size = 5, .layers = 3, .row_dim = 33, .row_type = kInt4}, 1);
  for (size_t offset = 0; offset < RomHeader::kBytes; ++offset) {
    for (const int pattern : {0x01, 0x80, 0xFF}) {
      CAPTURE(offset);
      CAPTURE(pattern);
      image.bytes[offset] ^= static_cast<uint8_t>(pattern);
      check_names(error_of<PackageError>([&] { parse(image); }), "some.rom");
      image.bytes[offset] ^= static_cast<uint8_t>(pattern);
    }
  }
  CHECK_NOTHROW(parse(image));
}

TEST_CASE("rom header: a wrong field is refused even with the right checksum") {
  struct Field {
    size_t offset;
    size_t bytes;
    const char* name;  // in the message
    std::vector<uint64_t> wrong;
  };
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  for (const RowFormat& format : kRowFormats) {
    const RomImage good({.vocab_size = 5, .layers = 3, .row_dim = 40, .row_type = format.type, .group = format.group},
                        1);
    const uint64_t size = good.bytes.size();
    const uint64_t end = 4096 + 5 * good.stride;  // not rounded up
    const uint64_t packed = (good.bundle_bytes + 3) / 4 * 4;
    const Field fields[] = {
        {0, 8, "magic", {0, 0x0A4D4F52494B454DULL + 1}},
        {8, 4, "version", {0, 2, 0xFFFFFFFF}},
        {12, 4, "byte-order", {0, 0x04030201}},
        {16, 8, "entries", {0, 1ULL << 31, 1ULL << 63, kMax}},
        {16, 8, "file_bytes", {5 + 64, (1ULL << 31) - 1}},
        {24, 4, "layers", {0, 65'536, 0xFFFFFFFF}},
        {24, 4, "bundle_bytes", {2, 4, 65'535}},
        {28, 4, "row_dim", {0, 1'048'577, 0xFFFFFFFF}},
        {32, 4, "row_type", {0, 5, 0xFFFFFFFF}},
        {32, 4, "group", {good.group > 0 ? kFloat16 : kInt8}},
        {36, 4, "group", {1, 31, 33, 41, 0xFFFFFFFF}},
        {40, 8, "bundle_bytes", {0, good.bundle_bytes - 1, good.bundle_bytes + 1, kMax}},
        {48,
         8,
         "bundle_stride",
         {0, good.stride - 64, good.stride - 1, good.stride + 4, good.stride + 64, packed - 4, packed + 1, packed + 4,
          kMax}},
        {56, 8, "data_offset", {0, 4095, 8192, kMax}},
        {64, 8, "file_bytes", {0, size - 4096, size + 4096, end, kMax}},
    };
    for (const Field& field : fields) {
      for (const uint64_t value : field.wrong) {
        CAPTURE(format.type);
        CAPTURE(value);
        RomImage image = good;
        if (field.bytes == 8) test::put(image.bytes, field.offset, value);
        if (field.bytes == 4) test::put(image.bytes, field.offset, static_cast<uint32_t>(value));
        image.seal_header();
        check_names(error_of<PackageError>([&] { parse(image); }), field.name);
      }
    }
  }
}

TEST_CASE("rom header: every reserved byte must be zero") {
  RomImage image({.vocab_size = 1, .layers = 1, .row_dim = 1, .row_type = kFloat16}, 1);
  for (size_t offset = 88; offset < 4092; ++offset) {
    CAPTURE(offset);
    image.bytes[offset] = static_cast<uint8_t>(1U << (offset % 8));
    image.seal_header();
    check_names(error_of<PackageError>([&] { parse(image); }), "reserved");
    image.bytes[offset] = 0;
  }
}

TEST_CASE("rom header: a file size that wraps around 64 bits is refused") {
  RomImage image({.vocab_size = 1, .layers = 1, .row_dim = 1, .row_type = kFloat32}, 1);
  constexpr uint64_t kVocab = (1ULL << 31) - 1;
  constexpr uint64_t kBundle = 65'535ULL * 4 * 1'048'576 + 4;  // the largest that the limits allow
  constexpr uint64_t kStride = kBundle + 60;
  static_assert(kStride % 64 == 0 && kStride > std::numeric_limits<uint64_t>::max() / kVocab);
  test::put(image.bytes, 16, kVocab);
  test::put(image.bytes, 24, uint32_t{65'535});
  test::put(image.bytes, 28, uint32_t{1'048'576});
  test::put(image.bytes, 40, kBundle);
  test::put(image.bytes, 48, kStride);
  test::put(image.bytes, 64, (4096 + kVocab * kStride + 4095) / 4096 * 4096);  // what unchecked arithmetic expects
  image.seal_header();
  check_names(error_of<PackageError>([&] { parse(image); }), "file_bytes");
}

TEST_CASE("rom: a file of any other size than the header says is refused") {
  const TempDir dir;
  const auto path = dir / "memory.rom";
  const RomImage image({.vocab_size = 150, .layers = 2, .row_dim = 30, .row_type = kInt8}, 1);
  const size_t size = image.bytes.size();
  REQUIRE(size > 3 * 4096);
  for (const size_t wrong : {size_t{0}, size_t{1}, size_t{88}, size_t{4095}, size_t{4096}, size_t{4097}, size / 2,
                             size - 4096, size - 1, size + 1, size + 4096}) {
    std::vector<uint8_t> bytes = image.bytes;
    bytes.resize(wrong);
    test::write_file(path, bytes);
    for (const RomAccess access : kAccesses) {
      CAPTURE(wrong);
      const std::string message = error_of<PackageError>([&] { TokenTable(path, access); });
      check_names(message, path.string());
      check_names(message, std::to_string(wrong));
    }
  }
}

TEST_CASE("rom: what is not a regular file is refused, not waited for") {
  const TempDir dir;
  std::filesystem::create_directory(dir / "directory");
  test::make_fifo(dir / "fifo");
  std::filesystem::create_symlink(dir / "nowhere", dir / "dangling");
  for (const char* name : {"missing", "directory", "fifo", "dangling"}) {
    for (const RomAccess access : kAccesses) {
      check_names(error_of<PackageError>([&] { TokenTable(dir / name, access); }), (dir / name).string());
    }
  }
}

TEST_CASE("rom: a token has one key, which is its id, and fills all of its rows") {
  const TempDir dir;
  const RomImage image({.vocab_size = 9, .layers = 3, .row_dim = 30, .row_type = kInt8}, 1);
  test::write_file(dir / "memory.rom", image.bytes);
  const TokenTable rom(dir / "memory.rom", RomAccess::pread);
  for (const RowShape& shape : {rom.shape(), rom.part()}) {
    CHECK(shape.layers == 3);
    CHECK(shape.row_dim == 30);
  }
  CHECK(rom.history() == 0);
  REQUIRE(rom.keys_per_token() == 1);
  RowKey key{.index = 99, .layer = 99, .column = 99};
  rom.keys(std::vector<int32_t>{3, 8}, std::span(&key, 1));
  CHECK(key.index == 8);
  CHECK(key.layer == 0);
  CHECK(key.column == 0);
  for (const int32_t beyond : {9, 1000, std::numeric_limits<int32_t>::max()}) {
    rom.keys(std::vector<int32_t>{3, beyond}, std::span(&key, 1));
    CHECK(key.index == 0);
  }
}

TEST_CASE("rom: access modes have names") {
  for (const RomAccess access : kAccesses) CHECK(parse_rom_access(name_of(access)) == access);
  for (const char* name : {"", "MMAP", "mmap ", "o_direct"}) {
    const std::string message = error_of<std::invalid_argument>([&] { parse_rom_access(name); });
    check_names(message, std::string("\"").append(name).append("\""));
    check_names(message, "mmap, pread or direct");
  }
}

TEST_CASE("rom: every access mode reads the same bytes, first bundle to last") {
  // Bundles of less than a stride unit, of exactly one, across blocks, and of several blocks; the last one ends before,
  // at and beyond a block's end.
  const RomShape shapes[] = {
      {1, 1, 1, kFloat16}, {64, 1, 30, kFloat16}, {65, 1, 31, kFloat16},  {130, 7, 33, kInt4},
      {9, 3, 2047, kInt8}, {5, 2, 4096, kInt4},   {3, 4, 5000, kFloat16}, {700, 1, 16, kInt8},
  };
  for (const RomShape& shape : shapes) {
    for (const uint64_t unit : kStrideUnits) {
      const TempDir dir;
      const RomImage image(shape, 2, unit);
      test::write_file(dir / "memory.rom", image.bytes);
      for (const RomAccess access : kAccesses) {
        const auto rom = open(dir / "memory.rom", access);
        const AlignedBuffer scratch(rom->scratch_bytes());
        std::vector<float> rows(size_t{shape.layers} * shape.row_dim);
        for (uint32_t token = 0; token < shape.vocab_size; ++token) {
          CAPTURE(token);
          CAPTURE(unit);
          rom->advise(token);
          CHECK(same_bytes(rom->fetch(token, scratch.span()).stored, image.payload(token)));
          const uint64_t begin = image.offset(token);
          const uint64_t blocks = (begin + image.bundle_bytes + 4095) / 4096 - begin / 4096;
          CHECK(rom->read(token, scratch.span(), rows.data(), shape.row_dim) ==
                (rom->access() == "direct" ? blocks * 4096 : image.bundle_bytes));
          CHECK(std::equal(rows.begin(), rows.end(),
                           image.rows(std::vector<int32_t>{static_cast<int32_t>(token)}).begin()));
        }
      }
    }
  }
}

TEST_CASE("rom: widening equals the naive reading, to the bit") {
  for (const RowFormat& format : kRowFormats) {
    for (const uint32_t row_dim : {1U, 2U, 3U, 31U, 32U, 33U, 63U, 64U, 65U, 100U}) {
      for (const uint32_t layers : {1U, 3U}) {
        CAPTURE(format.type);
        CAPTURE(row_dim);
        const TempDir dir;
        const RomImage image(
            {.vocab_size = 4, .layers = layers, .row_dim = row_dim, .row_type = format.type, .group = format.group},
            row_dim);
        test::write_file(dir / "memory.rom", image.bytes);
        const TokenTable rom(dir / "memory.rom", RomAccess::pread);
        const AlignedBuffer scratch(rom.scratch_bytes());
        for (uint32_t token = 0; token < 4; ++token) {
          // A stride beyond the row: what lies between the rows must stay.
          const size_t stride = row_dim + 2;
          std::vector<float> got(layers * stride, -7.0F);
          std::vector<float> expected = got;
          for (uint32_t layer = 0; layer < layers; ++layer) {
            for (uint32_t i = 0; i < row_dim; ++i) expected[layer * stride + i] = image.value(token, layer, i);
          }
          rom.read(token, scratch.span(), got.data(), stride);
          CHECK(std::equal(got.begin(), got.end(), expected.begin(),
                           [](float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }));
        }
      }
    }
  }
}

TEST_CASE("rom: all 65,536 float16 patterns widen, as values and as scales") {
  const TempDir dir;
  RomImage values({.vocab_size = 1, .layers = 1, .row_dim = 65'536, .row_type = kFloat16}, 1);
  for (uint32_t half = 0; half < 65'536; ++half) test::put(values.bytes, 4096 + 2 * half, static_cast<uint16_t>(half));
  values.seal_bundle(0);
  test::write_file(dir / "values.rom", values.bytes);
  // A scale is never infinite or NaN: 31,744 patterns of either sign, one a layer.
  constexpr uint32_t kFinite = 0x7C00;
  RomImage scales({.vocab_size = 1, .layers = 2 * kFinite, .row_dim = 3, .row_type = kInt8}, 1);
  for (uint32_t half = 0; half < kFinite; ++half) {
    test::put(scales.bytes, 4096 + 2 * half, static_cast<uint16_t>(half));
    test::put(scales.bytes, 4096 + 2 * (kFinite + half), static_cast<uint16_t>(0x8000 | half));
  }
  scales.seal_bundle(0);
  test::write_file(dir / "scales.rom", scales.bytes);

  for (const RomImage* image : {&values, &scales}) {
    const TokenTable rom(dir / (image == &values ? "values.rom" : "scales.rom"), RomAccess::mmap);
    const AlignedBuffer scratch(rom.scratch_bytes());
    const uint32_t dim = image->shape.row_dim;
    std::vector<float> got(size_t{image->shape.layers} * dim);
    rom.read(0, scratch.span(), got.data(), dim);
    size_t wrong = 0;
    for (uint32_t layer = 0; layer < image->shape.layers; ++layer) {
      for (uint32_t i = 0; i < dim; ++i) {
        const float value = got[layer * dim + i];
        const float expected = image->value(0, layer, i);
        const bool same = std::bit_cast<uint32_t>(value) == std::bit_cast<uint32_t>(expected);
        wrong += same || (std::isnan(value) && std::isnan(expected)) ? 0 : 1;
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("rom: any damaged byte of a bundle is an error that names the bundle") {
  const TempDir dir;
  const auto path = dir / "memory.rom";
  const RomImage image({.vocab_size = 70, .layers = 2, .row_dim = 9, .row_type = kInt4}, 3);
  test::write_file(path, image.bytes);
  constexpr uint32_t kToken = 37;
  for (const RomAccess access : kAccesses) {
    const auto rom = open(path, access);
    const AlignedBuffer scratch(rom->scratch_bytes());
    for (size_t i = 0; i < image.bundle_bytes; ++i) {
      const uint8_t good = image.bytes[image.offset(kToken) + i];
      const uint8_t bad[] = {static_cast<uint8_t>(good ^ (1U << (i % 8)))};
      test::patch_file(path, image.offset(kToken) + i, bad);
      const std::string message = error_of<PackageError>([&] { rom->fetch(kToken, scratch.span()); });
      check_names(message, path.string());
      check_names(message, "bundle 37");
      for (const uint32_t neighbour : {kToken - 1, kToken + 1}) CHECK_NOTHROW(rom->fetch(neighbour, scratch.span()));
      test::patch_file(path, image.offset(kToken) + i, std::span(&good, 1));
    }
    CHECK(same_bytes(rom->fetch(kToken, scratch.span()).stored, image.payload(kToken)));
  }
}

TEST_CASE("rom: a file that shrinks while it is open is an error, never a signal") {
  const RomImage image({.vocab_size = 200, .layers = 3, .row_dim = 50, .row_type = kInt8}, 4);
  const size_t size = image.bytes.size();
  for (const size_t left :
       {size - 1, size - 4096, image.offset(100) + 20, size_t{4096 * 3}, size_t{4096}, size_t{10}, size_t{0}}) {
    for (const RomAccess access : kAccesses) {
      CAPTURE(left);
      const TempDir dir;
      const auto path = dir / "memory.rom";
      test::write_file(path, image.bytes);
      const auto rom = open(path, access);
      // Each token has its own buffer, with the right bytes in it from before: what a short read leaves there is no
      // excuse.
      std::vector<AlignedBuffer> scratch;
      for (uint32_t token = 0; token < image.shape.vocab_size; ++token) {
        rom->fetch(token, scratch.emplace_back(rom->scratch_bytes()).span());
      }
      std::filesystem::resize_file(path, left);
      for (uint32_t token = 0; token < image.shape.vocab_size; ++token) {
        CAPTURE(token);
        rom->advise(token);
        const uint64_t end = image.offset(token) + image.bundle_bytes;
        if (end > left) {
          const std::string message = error_of<PackageError>([&] { rom->fetch(token, scratch[token].span()); });
          check_names(message, path.string());
        } else if ((end + 4095) / 4096 * 4096 <= left) {  // O_DIRECT needs the whole block
          CHECK(same_bytes(rom->fetch(token, scratch[token].span()).stored, image.payload(token)));
        }
      }
    }
  }
}

// Pages of a file that the page cache holds.
size_t cached_pages(const std::filesystem::path& path) {
  const File file(path);
  const Mapping mapping = Mapping::of_file(file, file.size(path));
  std::vector<unsigned char> pages((mapping.size() + 4095) / 4096);
  REQUIRE(::mincore(mapping.data(), mapping.size(), pages.data()) == 0);
  return static_cast<size_t>(std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; }));
}

TEST_CASE("rom: what is dropped from the page cache is read again, the same") {
  const RomImage image({.vocab_size = 300, .layers = 3, .row_dim = 50, .row_type = kInt8}, 6);
  for (const RomAccess access : kAccesses) {
    const TempDir dir;
    const auto path = dir / "memory.rom";
    test::write_file(path, image.bytes);
    {  // Only clean pages can be dropped, and only where the file system has a storage behind it.
      const File file(path);
      REQUIRE(::fsync(file.descriptor()) == 0);
      REQUIRE(::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED) == 0);
    }
    const bool can_drop = ::sysconf(_SC_PAGESIZE) == 4096 && cached_pages(path) == 0;
    if (!can_drop) MESSAGE("this machine keeps the pages of " << path.string());
    const auto rom = open(path, access);
    const AlignedBuffer scratch(rom->scratch_bytes());
    for (int round = 0; round < 3; ++round) {
      for (uint32_t token = 0; token < image.shape.vocab_size; ++token) {
        CHECK(same_bytes(rom->fetch(token, scratch.span()).stored, image.payload(token)));
      }
      if (can_drop && rom->access() != "direct") CHECK(cached_pages(path) > 0);
      rom->drop_cache();
      if (can_drop) CHECK(cached_pages(path) == 0);
    }
  }
}

TEST_CASE("rom: reads go on while the page cache is dropped") {
  const TempDir dir;
  const RomImage image({.vocab_size = 300, .layers = 3, .row_dim = 50, .row_type = kInt4}, 7);
  test::write_file(dir / "memory.rom", image.bytes);
  for (const RomAccess access : kAccesses) {
    const auto rom = open(dir / "memory.rom", access);
    std::atomic<size_t> wrong = 0;
    std::atomic<int> readers = 2;
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 2; ++thread) {
      threads.emplace_back([&] {
        const AlignedBuffer scratch(rom->scratch_bytes());
        for (uint32_t read = 0; read < 1500; ++read) {
          const uint32_t token = read * 7 % image.shape.vocab_size;
          rom->advise(token);
          if (!same_bytes(rom->fetch(token, scratch.span()).stored, image.payload(token))) ++wrong;
        }
        --readers;
      });
    }
    do {
      rom->drop_cache();
    } while (readers > 0);
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
  }
}

}  // namespace
}  // namespace meki
