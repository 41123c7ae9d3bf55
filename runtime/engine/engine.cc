#include "engine/engine.h"

#include <sched.h>

#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "engine/session.h"
#include "engine/stage_io.h"

namespace meki {
namespace {

constexpr int kMaxThreads = 1024;

int resolve_threads(int threads) {
  if (threads < 0 || threads > kMaxThreads) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 0 to " +
                                std::to_string(kMaxThreads));
  }
  if (threads > 0) return threads;
  cpu_set_t available;
  CPU_ZERO(&available);
  return ::sched_getaffinity(0, sizeof(available), &available) == 0 ? CPU_COUNT(&available) : 1;
}

// The same model as a dense one.
Manifest without_memory(Manifest manifest) {
  if (!manifest.memory) return manifest;
  manifest.stages = std::move(manifest.dense_stages);
  manifest.memory.reset();
  manifest.architecture.memory_dim = 0;
  return manifest;
}

// One token through all stages: ONNX Runtime checks every type and shape that the manifest promised, and the weights
// that the first real step needs are brought into memory.
void run_once(const std::shared_ptr<const Engine>& engine) {
  const Architecture& architecture = engine->manifest().architecture;
  Session session(engine, {.context = std::min<size_t>(architecture.context, 8), .chunk = 1});
  const int64_t token = 0;
  session.prompt({&token, 1});
  const Mapping logits = Mapping::zeroed(architecture.vocab_size * sizeof(float));
  session.logits(logits.as<float>());
}

}  // namespace

std::shared_ptr<const Rom> open_rom(const Manifest& manifest, RomAccess access, std::chrono::microseconds delay) {
  if (!manifest.memory) return nullptr;
  const std::filesystem::path path = manifest.directory / manifest.memory->file;
  auto rom = std::make_shared<const Rom>(path, access, delay);
  const RomHeader& header = rom->header();
  const auto require = [&path](const char* name, const std::string& got, const std::string& expected) {
    if (got != expected) {
      throw PackageError(path.string() + ": its " + name + " is " + got + ", the manifest says " + expected +
                         "; the file belongs to another package");
    }
  };
  const Architecture& architecture = manifest.architecture;
  require("vocabulary size", std::to_string(header.vocab_size), std::to_string(architecture.vocab_size));
  require("number of layers", std::to_string(header.layers), std::to_string(architecture.layers));
  require("row dimension", std::to_string(header.row_dim), std::to_string(architecture.memory_dim));
  require("row type", std::string(name_of(header.row_type)), manifest.memory->row_type);
  require("content id", header.content_id, manifest.memory->content_id);
  return rom;
}

std::shared_ptr<const Engine> Engine::open(const std::filesystem::path& directory, const EngineOptions& options) {
  const int threads = resolve_threads(options.threads);
  if (options.rom_delay.count() < 0) {
    throw std::invalid_argument("rom_delay is " + std::to_string(options.rom_delay.count()) +
                                " microseconds, expected at least 0");
  }
  Manifest manifest = Manifest::open(directory);
  if (!options.memory) manifest = without_memory(std::move(manifest));
  // A choice that the model's heads do not allow is an error of the caller, not of the package.
  static_cast<void>(KvLayout(options.kv_type, manifest.architecture.kv_heads, manifest.architecture.head_dim));
  auto rom = open_rom(manifest, options.rom_access, options.rom_delay);
  const GraphLoader load = onnxruntime_loader(options.onnxruntime, {threads, options.kv_type, options.profile});
  auto engine = std::make_shared<const Engine>(std::move(manifest), std::move(rom), load, threads, options.kv_type);
  run_once(engine);
  return engine;
}

Engine::Engine(Manifest manifest, std::shared_ptr<const Rom> rom, const GraphLoader& load, int threads, KvType kv_type)
    : manifest_(std::move(manifest)), rom_(std::move(rom)), threads_(threads), kv_type_(kv_type) {
  for (const StageInfo& info : manifest_.stages) {
    stages_.push_back({load(manifest_.directory / info.file), info.rows});
  }
  hidden_names_ = check_stages(manifest_, stages_);
}

}  // namespace meki
