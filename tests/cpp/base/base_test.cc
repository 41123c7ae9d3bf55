// runtime/base: checksums, checked arithmetic, files and mappings.

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <limits>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>

#include "runtime/base/checked.h"
#include "runtime/base/crc32c.h"
#include "runtime/base/error.h"
#include "runtime/base/file.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::TempDir;

std::span<const std::byte> as_bytes(std::span<const uint8_t> bytes) { return std::as_bytes(bytes); }

bool is_open(int descriptor) { return ::fcntl(descriptor, F_GETFD) != -1; }

TEST_CASE("crc32c: the vectors of RFC 3720, B.4") {
  std::array<uint8_t, 32> rising{};
  std::iota(rising.begin(), rising.end(), uint8_t{0});
  std::array<uint8_t, 32> falling{};
  std::copy(rising.rbegin(), rising.rend(), falling.begin());
  const std::array<uint8_t, 32> zeros{};
  std::array<uint8_t, 32> ones{};
  ones.fill(0xFF);
  const std::array<uint8_t, 48> read_command = {0x01, 0xC0, 0, 0, 0, 0, 0,    0, 0,    0, 0, 0,    0, 0, 0, 0,
                                                0x14, 0,    0, 0, 0, 0, 0x04, 0, 0,    0, 0, 0x14, 0, 0, 0, 0x18,
                                                0x28, 0,    0, 0, 0, 0, 0,    0, 0x02, 0, 0, 0,    0, 0, 0, 0};
  const std::pair<std::span<const uint8_t>, uint32_t> vectors[] = {
      {zeros, 0x8A9136AA},   {ones, 0x62A8AB43},         {rising, 0x46DD794E},
      {falling, 0x113FDB5C}, {read_command, 0xD9963A56}, {{}, 0},
  };
  for (const auto& [bytes, expected] : vectors) {
    CHECK(crc32c(as_bytes(bytes)) == expected);
    CHECK(crc32c_portable(as_bytes(bytes)) == expected);
    CHECK(test::naive_crc32c(bytes) == expected);
  }
}

TEST_CASE("crc32c: instruction, table and bit-by-bit agree at every length and alignment") {
  std::mt19937 random(1);
  std::vector<uint8_t> bytes(8 + 300);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  for (size_t begin = 0; begin < 8; ++begin) {
    for (size_t length = 0; length <= 300; ++length) {
      const auto part = std::span<const uint8_t>(bytes).subspan(begin, length);
      const uint32_t expected = test::naive_crc32c(part);
      CHECK(crc32c(as_bytes(part)) == expected);
      CHECK(crc32c_portable(as_bytes(part)) == expected);
    }
  }
}

TEST_CASE("checked arithmetic says nothing exactly when 64 bits do not suffice") {
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  const uint64_t values[] = {0,          1,          2,        3,   63, 64, 65, 1ULL << 31, (1ULL << 32) - 1,
                             1ULL << 32, 1ULL << 63, kMax - 1, kMax};
  for (const uint64_t a : values) {
    for (const uint64_t b : values) {
      CAPTURE(a);
      CAPTURE(b);
      CHECK(checked_mul(a, b) == (b != 0 && a > kMax / b ? std::nullopt : std::optional(a * b)));
      CHECK(checked_add(a, b) == (a > kMax - b ? std::nullopt : std::optional(a + b)));
      if (b == 0) continue;
      // By counting in quotients: the number of units that cover `a`.
      const uint64_t units = a / b + (a % b != 0 ? 1 : 0);
      CHECK(checked_round_up(a, b) == (units > kMax / b ? std::nullopt : std::optional(units * b)));
    }
  }
}

TEST_CASE("File is move-only, and closes its descriptor once") {
  static_assert(!std::is_copy_constructible_v<File> && !std::is_copy_assignable_v<File>);
  const TempDir dir;
  test::write_file(dir / "a", std::string_view("a"));
  test::write_file(dir / "bb", std::string_view("bb"));
  int first = -1;
  int second = -1;
  {
    File a(dir / "a");
    File b(dir / "bb");
    first = a.descriptor();
    second = b.descriptor();
    CHECK(a.size(dir / "a") == 1);
    File moved(std::move(a));
    CHECK(moved.descriptor() == first);
    CHECK(a.descriptor() == -1);  // NOLINT: the moved-from state is what is tested
    moved = std::move(b);
    CHECK(moved.descriptor() == second);
    CHECK(moved.size(dir / "bb") == 2);
    CHECK(is_open(second));
  }
  CHECK_FALSE(is_open(first));
  CHECK_FALSE(is_open(second));
}

TEST_CASE("File: what cannot be opened or has no size is an error that names it") {
  const TempDir dir;
  check_names(error_of<PackageError>([&] { File(dir / "missing"); }), "missing");
  std::filesystem::create_directory(dir / "directory");
  check_names(error_of<PackageError>([&] { File(dir / "directory").size(dir / "directory"); }), "directory");
  test::make_fifo(dir / "fifo");
  check_names(error_of<PackageError>([&] { File(dir / "fifo", O_NONBLOCK).size(dir / "fifo"); }), "fifo");
}

TEST_CASE("Mapping is move-only, shows the file, and is zeroed and page-aligned without one") {
  static_assert(!std::is_copy_constructible_v<Mapping> && !std::is_copy_assignable_v<Mapping>);
  const TempDir dir;
  test::write_file(dir / "text", std::string_view("mapped"));
  Mapping file = Mapping::of_file(File(dir / "text"), 6);  // outlives the descriptor
  REQUIRE(file.data() != nullptr);
  CHECK(std::string_view(file.as<char>(), file.size()) == "mapped");

  Mapping memory = Mapping::zeroed(10'000);
  CHECK(reinterpret_cast<uintptr_t>(memory.data()) % 4096 == 0);
  const std::span<const uint8_t> all(memory.as<uint8_t>(), memory.size());
  CHECK(all.size() == 10'000);
  CHECK(std::count(all.begin(), all.end(), 0) == 10'000);
  memory.as<char>()[9'999] = 'x';

  const std::byte* data = memory.data();
  Mapping moved(std::move(memory));
  CHECK(moved.data() == data);
  CHECK(memory.data() == nullptr);  // NOLINT: the moved-from state is what is tested
  CHECK(memory.size() == 0);
  moved = std::move(file);
  CHECK(std::string_view(moved.as<char>(), moved.size()) == "mapped");

  CHECK(Mapping().data() == nullptr);
  CHECK(Mapping::zeroed(0).size() == 0);
  CHECK_THROWS_AS(Mapping::zeroed(std::numeric_limits<size_t>::max() / 2), std::bad_alloc);
}

TEST_CASE("Mapping::of_file is empty where the system cannot map") {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const TempDir dir;
  const File fifo(("/dev/fd/" + std::to_string(ends[0])), O_NONBLOCK);
  CHECK(Mapping::of_file(fifo, 4096).data() == nullptr);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("read_text: whole files up to the limit, and an error that names what is none") {
  const TempDir dir;
  const std::string text("line\n\0\xFF", 7);
  test::write_file(dir / "text", std::string_view(text));
  CHECK(read_text(dir / "text", 7) == text);
  const std::string too_long = error_of<PackageError>([&] { read_text(dir / "text", 6); });
  check_names(too_long, (dir / "text").string());
  check_names(too_long, "7");
  check_names(too_long, "6");
  test::write_file(dir / "empty", std::string_view());
  CHECK(read_text(dir / "empty", 0).empty());

  std::filesystem::create_directory(dir / "directory");
  test::make_fifo(dir / "fifo");  // has no writer: reading it would wait for ever
  std::filesystem::create_symlink(dir / "nowhere", dir / "dangling");
  for (const char* name : {"missing", "directory", "fifo", "dangling"}) {
    check_names(error_of<PackageError>([&] { read_text(dir / name, 100); }), (dir / name).string());
  }
}

}  // namespace
}  // namespace meki
