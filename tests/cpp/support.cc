#include "tests/cpp/support.h"

#include <sys/stat.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <limits>
#include <random>
#include <stdexcept>

namespace meki::test {
namespace {

constexpr size_t kHeaderBytes = 4096;

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

void write_at(std::fstream file, const std::filesystem::path& path, size_t offset, std::span<const uint8_t> bytes) {
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path.string());
}

}  // namespace

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "meki-test-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make a directory like " + name);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;  // a leftover directory fails no test
  std::filesystem::remove_all(path_, ignored);
}

void write_file(const std::filesystem::path& path, std::span<const uint8_t> bytes) {
  std::filesystem::remove(path);  // ext4 flushes a file that is truncated and written again: milliseconds each
  write_at(std::fstream(path, std::ios::binary | std::ios::out | std::ios::trunc), path, 0, bytes);
}

void write_file(const std::filesystem::path& path, std::string_view text) {
  write_file(path, {reinterpret_cast<const uint8_t*>(text.data()), text.size()});
}

void patch_file(const std::filesystem::path& path, size_t offset, std::span<const uint8_t> bytes) {
  write_at(std::fstream(path, std::ios::binary | std::ios::in | std::ios::out), path, offset, bytes);
}

void make_fifo(const std::filesystem::path& path) {
  if (::mkfifo(path.c_str(), 0600) != 0) throw std::runtime_error("cannot make the FIFO " + path.string());
}

uint32_t naive_crc32c(std::span<const uint8_t> bytes) {
  uint32_t crc = 0xFFFFFFFF;
  for (const uint8_t byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82F63B78 : crc >> 1;
  }
  return ~crc;
}

float naive_half(uint16_t half) {
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  if (exponent == 31 && fraction != 0) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 31) return static_cast<float>(sign) * std::numeric_limits<float>::infinity();
  if (exponent == 0) return static_cast<float>(sign * std::ldexp(fraction, -24));
  return static_cast<float>(sign * std::ldexp(1024 + fraction, exponent - 25));
}

RomImage::RomImage(const RomShape& rom_shape, uint32_t seed, uint64_t stride_unit) : shape(rom_shape) {
  if (shape.row_type == kInt8) group = shape.group == 0 ? shape.row_dim : shape.group;
  if (shape.row_type == kInt4) group = 32;
  groups = group == 0 ? 0 : (uint64_t{shape.row_dim} + group - 1) / group;
  row_bytes = shape.row_dim;
  if (shape.row_type == kFloat16) row_bytes = 2 * uint64_t{shape.row_dim};
  if (shape.row_type == kInt4) row_bytes = (uint64_t{shape.row_dim} + 1) / 2;
  if (shape.row_type == kFloat32) row_bytes = 4 * uint64_t{shape.row_dim};
  bundle_bytes = shape.layers * (2 * groups + row_bytes) + 4;
  stride = round_up(bundle_bytes, stride_unit);
  bytes.resize(round_up(kHeaderBytes + shape.vocab_size * stride, 4096));

  const std::string_view magic = "MEKIROM\n";
  std::copy(magic.begin(), magic.end(), bytes.begin());
  put(bytes, 8, uint32_t{1});
  put(bytes, 12, uint32_t{0x01020304});
  put(bytes, 16, uint64_t{shape.vocab_size});
  put(bytes, 24, shape.layers);
  put(bytes, 28, shape.row_dim);
  put(bytes, 32, shape.row_type);
  put(bytes, 36, group);
  put(bytes, 40, bundle_bytes);
  put(bytes, 48, stride);
  put(bytes, 56, uint64_t{kHeaderBytes});
  put(bytes, 64, uint64_t{bytes.size()});
  // Nothing that opens a file recomputes the content id: a recognisable one will do.
  for (size_t i = 0; i < 16; ++i) bytes[72 + i] = static_cast<uint8_t>(0x11 * i);
  seal_header();
  for (uint64_t token = 0; token < shape.vocab_size; ++token) {
    fill_bundle(token, seed * 7919 + static_cast<uint32_t>(token));
  }
}

void RomImage::fill_bundle(uint64_t token, uint32_t seed) {
  std::mt19937 random(seed);
  const size_t scales = shape.layers * groups;
  for (size_t i = 0; i < scales; ++i) {
    const auto scale = static_cast<uint16_t>(random() & 0xFBFF);  // not infinite or NaN
    put(bytes, offset(token) + 2 * i, scale);
  }
  const size_t rows_at = offset(token) + 2 * scales;
  for (size_t i = 0; i < shape.layers * row_bytes; ++i) {
    uint32_t byte = random() & 0xFF;
    if (shape.row_type == kFloat16 && i % 2 == 1) byte &= 0xFB;  // finite
    if (shape.row_type == kFloat32 && i % 4 == 3) byte &= 0xBF;  // finite
    if (shape.row_type == kInt4 && shape.row_dim % 2 == 1 && i % row_bytes == row_bytes - 1) byte = (byte & 15) | 0x80;
    bytes[rows_at + i] = static_cast<uint8_t>(byte);
  }
  seal_bundle(token);
}

std::span<const uint8_t> RomImage::payload(uint64_t token) const {
  return std::span(bytes).subspan(offset(token), bundle_bytes - 4);
}

void RomImage::seal_bundle(uint64_t token) {
  put(bytes, offset(token) + bundle_bytes - 4, naive_crc32c(payload(token)));
}

void RomImage::seal_header() { put(bytes, 4092, naive_crc32c(std::span(bytes).first(4092))); }

float RomImage::value(uint64_t token, uint32_t layer, uint32_t i) const {
  const uint8_t* bundle = bytes.data() + offset(token);
  const auto half_at = [bundle](uint64_t index) {
    return naive_half(static_cast<uint16_t>(bundle[2 * index] | bundle[2 * index + 1] << 8));
  };
  const uint64_t element = uint64_t{layer} * shape.row_dim + i;
  if (shape.row_type == kFloat16) return half_at(element);
  if (shape.row_type == kFloat32) {
    uint32_t bits = 0;
    for (uint32_t byte = 0; byte < 4; ++byte) bits |= uint32_t{bundle[4 * element + byte]} << (8 * byte);
    return std::bit_cast<float>(bits);
  }
  const float scale = half_at(layer * groups + i / group);
  const uint8_t* row = bundle + 2 * shape.layers * groups + layer * row_bytes;
  int quant = 0;
  if (shape.row_type == kInt8) quant = row[i] < 128 ? row[i] : row[i] - 256;
  if (shape.row_type == kInt4) quant = (i % 2 == 0 ? row[i / 2] % 16 : row[i / 2] / 16) - 8;
  // 11 significant bits times 8: exact in float32, whatever the order of rounding.
  return static_cast<float>(double{scale} * quant);
}

std::vector<float> RomImage::rows(std::span<const int32_t> ids) const {
  std::vector<float> out;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const int32_t id : ids) {
      for (uint32_t i = 0; i < shape.row_dim; ++i) out.push_back(value(static_cast<uint64_t>(id), layer, i));
    }
  }
  return out;
}

AlignedBuffer::AlignedBuffer(size_t bytes)
    : bytes_(bytes), data_(static_cast<std::byte*>(std::aligned_alloc(4096, bytes)), &std::free) {
  if (data_ == nullptr) throw std::bad_alloc();
}

nlohmann::json write_package_files(const std::filesystem::path& directory) {
  nlohmann::json manifest = nlohmann::json::parse(R"({
    "format": "meki-package",
    "version": 5,
    "name": "test",
    "architecture": {
      "vocab_size": 64, "layers": 4, "hidden": 8, "ffn": 16, "heads": 4, "kv_heads": 2, "head_dim": 16,
      "context": 512, "rope_theta": 10000.0, "norm_eps": 1e-06, "qk_norm": true
    },
    "memory": {
      "kind": "meki", "address": {"kind": "token"}, "layers": 4, "row_dim": 16, "file": "memory.rom", "row_type": "int8",
      "content_id": ""
    },
    "stages": [{"file": "stage0.onnx", "rows": null}, {"file": "stage1.onnx", "rows": [0, 4]}],
    "dense_stages": [{"file": "dense.onnx"}],
    "weights": {"type": "int8", "block": 32},
    "tokenizer": {
      "file": "tokenizer.json", "bos_token_id": null, "eos_token_ids": [0, 63],
      "chat_template": {"file": "chat_template.jinja", "variables": {"eos_token": "<|end|>"}}
    },
    "files": {},
    "quantization_error": {},
    "provenance": {"weights": "random"}
  })");
  manifest["memory"]["content_id"] = RomImage::kContentId;
  const RomImage rom({.vocab_size = 64, .layers = 4, .row_dim = 16, .row_type = kInt8}, 1);
  write_file(directory / "memory.rom", rom.bytes);
  for (const char* name :
       {"stage0.onnx", "stage1.onnx", "dense.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja"}) {
    write_file(directory / name, std::string_view(name));
  }
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    nlohmann::json& file = manifest["files"][entry.path().filename()];
    file["bytes"] = entry.file_size();
    file["sha256"] = std::string(64, '0');
  }
  return manifest;
}

nlohmann::json write_ngram_package_files(const std::filesystem::path& directory) {
  nlohmann::json manifest = write_package_files(directory);
  const RomImage rom({.vocab_size = 40, .layers = 1, .row_dim = 4, .row_type = kInt8}, 2, 4);
  write_file(directory / "memory.rom", rom.bytes);
  std::vector<uint8_t> canonical(64 * sizeof(int32_t));
  for (uint32_t token = 0; token < 64; ++token) put(canonical, token * sizeof(int32_t), token / 2);
  write_file(directory / "canonical_ids.bin", canonical);

  nlohmann::json& memory = manifest["memory"];
  memory["kind"] = "engram";
  memory["layers"] = 2;
  memory["address"] = nlohmann::json::parse(R"({
    "kind": "ngram_hash", "ngram": 3, "heads": 2, "pad": 1, "reset": [0, 63], "canonical": {"file": "canonical_ids.bin"},
    "layers": [
      {"multipliers": [5, 7, 11], "primes": [3, 5, 7, 11], "offsets": [0, 3, 8, 15]},
      {"multipliers": [13, 17, 144115188075855871], "primes": [2, 3, 5, 7], "offsets": [26, 28, 31, 33]}
    ]
  })");
  memory["address"]["canonical"]["crc32c"] = naive_crc32c(canonical);
  manifest["stages"][1]["rows"] = {0, 2};
  for (const char* name : {"memory.rom", "canonical_ids.bin"}) {
    manifest["files"][name] = {{"bytes", std::filesystem::file_size(directory / name)},
                               {"sha256", std::string(64, '0')}};
  }
  return manifest;
}

void write_manifest(const std::filesystem::path& directory, const nlohmann::json& manifest) {
  write_file(directory / "manifest.json", std::string_view(manifest.dump(2)));
}

}  // namespace meki::test
