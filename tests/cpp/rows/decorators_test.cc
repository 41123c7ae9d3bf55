// runtime/rows: what a decorator changes about a source of rows, and that it changes nothing else.

#include <chrono>
#include <functional>

#include "runtime/base/error.h"
#include "runtime/rows/delayed_rows.h"
#include "runtime/rows/token_table.h"
#include "tests/cpp/rows/faulty_rows.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::AlignedBuffer;
using test::check_names;
using test::error_of;
using test::FaultyRows;
using test::kInt8;
using test::RomImage;
using test::TempDir;

constexpr RomAccess kAccesses[] = {RomAccess::mmap, RomAccess::pread, RomAccess::direct};

struct Fixture {
  Fixture() : image({.vocab_size = 20, .layers = 2, .row_dim = 30, .row_type = kInt8}, 5) {
    test::write_file(path, image.bytes);
  }
  std::shared_ptr<const TokenTable> open(RomAccess access) const {
    return std::make_shared<const TokenTable>(path, access);
  }

  TempDir dir;
  std::filesystem::path path = dir / "memory.rom";
  RomImage image;
};

// Whether `source` gives the rows of `token` that the image has, and asks for as many bytes as `bare`.
bool reads(const Fixture& fixture, const RowSource& source, const RowSource& bare, int32_t token) {
  const AlignedBuffer scratch(source.scratch_bytes());
  const std::vector<float> expected = fixture.image.rows(std::span(&token, 1));
  std::vector<float> got(expected.size());
  const auto index = static_cast<uint64_t>(token);
  const size_t bytes = source.read(index, scratch.span(), got.data(), source.shape().row_dim);
  return got == expected && bytes == bare.read(index, scratch.span(), got.data(), source.shape().row_dim);
}

TEST_CASE("delayed rows: the delay adds to every read, and changes nothing else") {
  constexpr std::chrono::milliseconds kDelay{3};
  const Fixture fixture;
  for (const RomAccess access : kAccesses) {
    const auto rom = fixture.open(access);
    const DelayedRows delayed(rom, kDelay);
    for (const int32_t token : {0, 7, 7, 19}) {
      const auto start = std::chrono::steady_clock::now();
      CHECK(reads(fixture, delayed, *rom, token));
      CHECK(std::chrono::steady_clock::now() - start >= kDelay);
    }
  }
}

TEST_CASE("faulty rows: only what is damaged fails, and only until it is repaired") {
  const Fixture fixture;
  const auto rom = fixture.open(RomAccess::pread);
  const FaultyRows faulty(rom);
  CHECK(reads(fixture, faulty, *rom, 7));
  faulty.damage(7);
  check_names(error_of<PackageError>([&] { reads(fixture, faulty, *rom, 7); }), "bundle 7");
  CHECK(reads(fixture, faulty, *rom, 8));
  faulty.repair(7);
  CHECK(reads(fixture, faulty, *rom, 7));
}

TEST_CASE("decorators: all that they do not change is the source's") {
  // Every answer is one that no other source of the tests gives.
  class Odd final : public RowSource {
   public:
    explicit Odd(std::vector<std::string>& calls) : calls_(calls) {}
    RowShape shape() const override { return {4, 6}; }
    RowShape part() const override { return {2, 3}; }
    size_t keys_per_token() const override { return 5; }
    size_t history() const override { return 7; }
    void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const override {
      out[1] = {static_cast<uint64_t>(sequence.back()), 1, 3};
    }
    size_t part_bytes() const override { return 9; }
    size_t scratch_bytes() const override { return 11; }
    void advise(uint64_t index) const noexcept override { calls_.push_back("advise " + std::to_string(index)); }
    FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override {
      return {scratch.first(9), index + 1};
    }
    void widen(std::span<const std::byte> stored, float* out, size_t layer_stride) const noexcept override {
      *out = static_cast<float>(stored.size() + layer_stride);
    }
    void drop_cache() const noexcept override { calls_.emplace_back("drop"); }
    std::string_view access() const override { return "odd"; }

   private:
    std::vector<std::string>& calls_;
  };
  std::vector<std::string> calls;
  const DelayedRows rows(std::make_shared<const Odd>(calls), std::chrono::microseconds(1));
  CHECK(rows.shape().layers == 4);
  CHECK(rows.shape().row_dim == 6);
  CHECK(rows.part().layers == 2);
  CHECK(rows.part().row_dim == 3);
  CHECK(rows.keys_per_token() == 5);
  CHECK(rows.history() == 7);
  std::vector<RowKey> keys(5);
  rows.keys(std::vector<int32_t>{1, 13}, keys);
  CHECK(keys[1].index == 13);
  CHECK(keys[1].layer == 1);
  CHECK(keys[1].column == 3);
  CHECK(rows.part_bytes() == 9);
  CHECK(rows.scratch_bytes() == 11);
  std::vector<std::byte> scratch(11);
  float value = 0;
  CHECK(rows.read(40, scratch, &value, 6) == 41);
  CHECK(value == 15);
  rows.advise(17);
  rows.drop_cache();
  CHECK(calls == std::vector<std::string>{"advise 17", "drop"});
  CHECK(rows.access() == "odd");
}

}  // namespace
}  // namespace meki
