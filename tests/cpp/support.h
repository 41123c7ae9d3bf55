#pragma once

// What several tests share: temporary directories, and ROM files and packages written from docs/ alone, without any
// code of the runtime.

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace meki::test {

// A directory that goes away with everything in it.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

void write_file(const std::filesystem::path& path, std::span<const uint8_t> bytes);
void write_file(const std::filesystem::path& path, std::string_view text);
// Overwrites bytes of an existing file in place; readers that have it open see the change.
void patch_file(const std::filesystem::path& path, size_t offset, std::span<const uint8_t> bytes);
void make_fifo(const std::filesystem::path& path);

// CRC-32C bit by bit, and binary16 by its definition.
uint32_t naive_crc32c(std::span<const uint8_t> bytes);
float naive_half(uint16_t half);

// `value` at `offset`, little-endian.
template <class T>
void put(std::vector<uint8_t>& bytes, size_t offset, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) bytes.at(offset + i) = static_cast<uint8_t>(uint64_t{value} >> (8 * i));
}

inline constexpr uint32_t kFloat16 = 1;
inline constexpr uint32_t kInt8 = 2;
inline constexpr uint32_t kInt4 = 3;
inline constexpr uint32_t kFloat32 = 4;

struct RomShape {
  uint32_t vocab_size;
  uint32_t layers;
  uint32_t row_dim;
  uint32_t row_type;   // as in the file
  uint32_t group = 0;  // of int8 rows; 0: a row
};

// A ROM file in memory, as docs/rom-format.md has it: a valid header and random bundles.
class RomImage {
 public:
  // stride_unit: what the distance of two bundles is a multiple of, 64 or 4.
  RomImage(const RomShape& shape, uint32_t seed, uint64_t stride_unit = 64);

  RomShape shape;
  uint32_t group = 0;   // values that share a scale
  uint64_t groups = 0;  // scales of one row
  uint64_t row_bytes = 0;
  uint64_t bundle_bytes = 0;
  uint64_t stride = 0;
  std::vector<uint8_t> bytes;

  static constexpr std::string_view kContentId = "00112233445566778899aabbccddeeff";

  size_t offset(uint64_t token) const { return 4096 + token * stride; }
  // The scales and rows of a bundle.
  std::span<const uint8_t> payload(uint64_t token) const;
  // Recomputes a checksum after a change.
  void seal_bundle(uint64_t token);
  void seal_header();

  // The naive reading that the runtime is tested against: element `i` of a row.
  float value(uint64_t token, uint32_t layer, uint32_t i) const;
  // float32 [layers, ids, row_dim].
  std::vector<float> rows(std::span<const int32_t> ids) const;

 private:
  void fill_bundle(uint64_t token, uint32_t seed);
};

// Memory as RowSource::read wants it; on the heap, so that a sanitizer sees a step beyond its end.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes);
  std::span<std::byte> span() const { return {data_.get(), bytes_}; }

 private:
  size_t bytes_;
  std::unique_ptr<std::byte, decltype(&std::free)> data_;
};

// Writes the files of a small valid package (graphs and weights are not graphs: nothing here loads them) and returns
// its manifest, which write_manifest puts beside them.
nlohmann::json write_package_files(const std::filesystem::path& directory);
// The same of a package whose rows hashed n-grams tell: 2 lengths of 2 heads of 4 values, in 2 layers, over a ROM of 40
// bundles. Canonical ids are the tokens' halves, rounded down.
nlohmann::json write_ngram_package_files(const std::filesystem::path& directory);
void write_manifest(const std::filesystem::path& directory, const nlohmann::json& manifest);

// The message of the Error that `work` throws. The test fails if it throws nothing; anything else passes through and
// fails it too.
template <class Error, class Work>
std::string error_of(Work&& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  }
  FAIL("no error was thrown");
  return {};
}

inline void check_names(const std::string& message, std::string_view part) {
  const bool found = message.find(part) != std::string::npos;
  CHECK_MESSAGE(found, "\"" << part << "\" in: " << message);
}

}  // namespace meki::test
