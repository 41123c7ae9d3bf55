// A whole package: meki-tiny with its files edited, opened and run for some tokens.
//
// An input is a byte of options and then edits: the file (1 byte, modulo their number), what to do (1 byte), where
// (3 bytes), how many bytes (1 byte), and these bytes. The environment's MEKI_ONNXRUNTIME names the library.

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "fuzz/target.h"
#include "runtime/base/crc32c.h"
#include "runtime/engine/session.h"

namespace meki::fuzz {
namespace {

constexpr int kSkipped = 77;  // the exit code for CTest

constexpr std::array kFiles = {"manifest.json", "stage0.onnx", "stage1.onnx",
                               "dense.onnx",    "weights.bin", "memory.rom"};
constexpr size_t kTokens = 8;  // of the prompt

struct Options {
  bool restate = false;  // the manifest states the sizes that files have after the edits
  bool seal = false;     // so do the checksums of the ROM's header and of the prompt's bundles
  bool memory = true;
  bool prefetch = true;
  bool mmap = false;
  KvType kv_type = KvType::int8;
};

Options options_of(uint8_t byte) {
  constexpr std::array kTypes = {KvType::int8, KvType::int4, KvType::float16, KvType::float32};
  const auto bit = [byte](int index) { return (byte >> index & 1) != 0; };
  return {bit(0), bit(1), !bit(2), !bit(3), bit(4), kTypes[byte >> 5 & 3]};
}

// Takes values from an input; zeros and no bytes behind its end.
class Reader {
 public:
  explicit Reader(std::string_view input) : rest_(input) {}
  bool empty() const { return rest_.empty(); }
  std::string_view bytes(size_t count) {
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  size_t number(size_t count) {
    size_t value = 0;
    for (const char byte : bytes(count)) value = value << 8 | static_cast<uint8_t>(byte);
    return value;
  }

 private:
  std::string_view rest_;
};

void edit(std::string& text, size_t action, size_t where, std::string_view bytes) {
  where = std::min(where, text.size());
  const size_t covered = std::min(bytes.size(), text.size() - where);
  switch (action % 4) {
    case 0: text.replace(where, covered, bytes.substr(0, covered)); break;
    case 1: text.insert(where, bytes); break;
    case 2: text.erase(where, covered); break;
    default: text.resize(where);
  }
}

void seal(std::string& text, size_t begin, size_t end) {
  const uint32_t checksum = crc32c(std::as_bytes(std::span(text).subspan(begin, end - begin)));
  std::memcpy(text.data() + end, &checksum, sizeof(checksum));
}

// A copy of meki-tiny, and what an input makes of it until the next one.
class Package {
 public:
  Package() {
    for (const auto& entry : std::filesystem::directory_iterator(MEKI_FUZZ_PACKAGE)) {
      std::filesystem::copy(entry.path(), scratch_.path());
    }
    for (const char* name : kFiles) {
      std::ifstream file(scratch_ / name, std::ios::binary);
      originals_[name].assign(std::istreambuf_iterator<char>(file), {});
    }
    const auto rom = std::as_bytes(std::span(originals_["memory.rom"])).first<RomHeader::kBytes>();
    header_ = RomHeader::parse(rom, "memory.rom");
  }

  const std::filesystem::path& path() const { return scratch_.path(); }

  // Whether anything was edited.
  bool apply(const Options& options, Reader input) {
    for (const std::string& name : edited_) scratch_.write(name, originals_[name]);
    edited_.clear();
    std::map<std::string, std::string> texts;
    while (!input.empty()) {
      const std::string name = kFiles[input.number(1) % kFiles.size()];
      std::string& text = texts.try_emplace(name, originals_[name]).first->second;
      const size_t action = input.number(1);
      size_t where = input.number(3);
      // What the prompt does not read is not worth an edit.
      where %= name == "memory.rom" ? header_.data_offset + kTokens * header_.bundle_stride : text.size() + 1;
      edit(text, action, where, input.bytes(input.number(1)));
    }
    if (options.seal && texts.contains("memory.rom")) seal_rom(texts["memory.rom"]);
    if (options.restate) restate(texts);
    for (const auto& [name, text] : texts) {
      scratch_.write(name, text);
      edited_.push_back(name);
    }
    return !texts.empty();
  }

 private:
  void seal_rom(std::string& rom) const {
    if (rom.size() < header_.data_offset + kTokens * header_.bundle_stride) return;
    seal(rom, 0, RomHeader::kBytes - sizeof(uint32_t));
    for (size_t token = 0; token < kTokens; ++token) {
      const size_t begin = header_.data_offset + token * header_.bundle_stride;
      seal(rom, begin, begin + header_.bundle_bytes - sizeof(uint32_t));
    }
  }

  void restate(std::map<std::string, std::string>& texts) {
    auto& manifest = texts.try_emplace("manifest.json", originals_["manifest.json"]).first->second;
    auto json = nlohmann::json::parse(manifest, nullptr, false);
    if (!json.is_object() || !json["files"].is_object()) return;
    for (const auto& [name, text] : texts) {
      if (json["files"][name].is_object()) json["files"][name]["bytes"] = text.size();
    }
    manifest = json.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  }

  const Scratch scratch_;
  std::map<std::string, std::string> originals_;
  std::vector<std::string> edited_;
  RomHeader header_;
};

void run(const std::filesystem::path& path, const Options& options, const char* onnxruntime) {
  const auto engine = Engine::open(path, {.onnxruntime = onnxruntime,
                                          .threads = 1,
                                          .rom_access = options.mmap ? RomAccess::mmap : RomAccess::pread,
                                          .kv_type = options.kv_type,
                                          .memory = options.memory});
  Session session(engine, {.context = std::min<size_t>(engine->backend().info().context, 2 * kTokens),
                           .prefetch = options.prefetch,
                           .chunk = kTokens - 1});
  const size_t vocab_size = engine->manifest().architecture.vocab_size;
  std::vector<int64_t> prompt(std::min({kTokens, vocab_size, session.context()}));
  std::iota(prompt.begin(), prompt.end(), 0);
  session.append(prompt);
  session.start({.temperature = 0}, 3);
  while (const auto token = session.next()) {
    require(*token >= 0 && static_cast<size_t>(*token) < vocab_size, "a token of the vocabulary");
  }
}

}  // namespace
}  // namespace meki::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace meki::fuzz;
  static const char* const onnxruntime = std::getenv("MEKI_ONNXRUNTIME");
  if (onnxruntime == nullptr) {
    std::fputs("skipped: MEKI_ONNXRUNTIME does not name a libonnxruntime.so\n", stderr);
    std::exit(kSkipped);
  }
  static Package package;
  Reader input(text_of(data, size));
  const Options options = options_of(static_cast<uint8_t>(input.number(1)));
  const bool edited = package.apply(options, input);
  bool good = false;
  try {
    good = accepts([&] { run(package.path(), options, onnxruntime); });
  } catch (const std::invalid_argument& error) {
    require(options.kv_type == meki::KvType::int4, error.what());  // which not every head can have
  }
  require(good || edited, "meki-tiny as it is runs");
  return 0;
}
