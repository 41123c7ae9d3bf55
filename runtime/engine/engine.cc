#include "runtime/engine/engine.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <span>
#include <stdexcept>

#include "runtime/base/error.h"
#include "runtime/engine/session.h"
#include "runtime/executor/stage_io.h"
#include "runtime/graph/qnn.h"
#include "runtime/rows/delayed_rows.h"
#include "runtime/rows/open_rows.h"

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
  for (auto& [name, target] : manifest.qnn) {
    target.decode = std::move(target.dense_decode);
    target.prefill = std::move(target.dense_prefill);
  }
  return manifest;
}

// One token through all stages, and compiled ones with two tokens as well: ONNX Runtime checks every type and shape
// that the manifest promised, and the weights that the first real step needs are brought into memory.
void run_once(const std::shared_ptr<const Engine>& engine) {
  const Mapping logits = Mapping::zeroed(2 * engine->manifest().architecture.vocab_size * sizeof(float));
  const std::array<int64_t, 2> tokens = {0, 0};
  Session session(engine, {.context = std::min<size_t>(engine->context(), 8), .chunk = 2});
  const bool prefill = engine->provider() == Provider::qnn && session.context() > 1;
  for (size_t count = prefill ? 2 : 1; count > 0; --count) {
    session.rewind(0);
    session.prompt(std::span(tokens).first(count));
    session.logits(logits.as<float>());
  }
}

std::shared_ptr<const RowSource> open_source(const Manifest& manifest, const EngineOptions& options) {
  auto source = open_rows(manifest, options.rom_access);
  if (source == nullptr || options.rom_delay.count() == 0) return source;
  return std::make_shared<const DelayedRows>(std::move(source), options.rom_delay);
}

std::shared_ptr<Engine> open_cpu(Manifest manifest, const EngineOptions& options, int threads) {
  const KvType kv_type = options.kv_type.value_or(KvType::int8);
  manifest.check_files();
  if (!options.memory) manifest = without_memory(std::move(manifest));
  // A choice that the model's heads do not allow is an error of the caller, not of the package.
  static_cast<void>(KvLayout(kv_type, manifest.architecture.kv_heads, manifest.architecture.head_dim));
  auto rows = open_source(manifest, options);
  const GraphLoader load = onnxruntime_loader(options.onnxruntime, {threads, kv_type, options.profile});
  return std::make_shared<Engine>(std::move(manifest), std::move(rows), load, threads, kv_type);
}

std::shared_ptr<Engine> open_qnn(Manifest manifest, const EngineOptions& options, int threads) {
  if (options.kv_type.value_or(KvType::float16) != KvType::float16) {
    throw std::invalid_argument("kv_type is " + std::string(name_of(*options.kv_type)) +
                                ", expected float16: compiled stages keep keys and values in no other type");
  }
  const std::string soc = manifest.find_target(options.soc);
  manifest.check_target_files(soc);
  const QnnTarget target = manifest.qnn.at(soc);
  if (!options.memory) {
    if (manifest.memory && target.dense_decode.empty()) {
      const std::string package = manifest.directory.string();
      throw std::invalid_argument(package + ": compiled without its dense variant; run meki-compile " + package +
                                  " --soc " + soc + " --dense");
    }
    manifest = without_memory(std::move(manifest));
  }
  auto rows = open_source(manifest, options);
  const GraphLoader cpu = onnxruntime_loader(options.onnxruntime, {threads, KvType::float16, options.profile});
  const GraphLoader qnn = qnn_loader(options.onnxruntime, options.qnn_library,
                                     {.soc_model = target.soc_model,
                                      .htp_arch = target.htp_arch,
                                      .shared_memory = !qnn_is_simulated(),  // the simulator has none
                                      .profile = options.profile});
  StaticModel model = load_static_model(manifest, soc, qnn_is_simulated(), cpu, qnn);
  return std::make_shared<Engine>(std::move(manifest), std::move(rows), std::move(model), threads);
}

}  // namespace

std::string_view name_of(Provider provider) { return provider == Provider::qnn ? "qnn" : "cpu"; }

Provider parse_provider(std::string_view name) {
  for (const Provider provider : {Provider::cpu, Provider::qnn}) {
    if (name == name_of(provider)) return provider;
  }
  throw std::invalid_argument("provider is \"" + std::string(name) + "\", expected cpu or qnn");
}

std::shared_ptr<const Engine> Engine::open(const std::filesystem::path& directory, const EngineOptions& options) {
  const int threads = resolve_threads(options.threads);
  if (options.rom_delay.count() < 0) {
    throw std::invalid_argument("rom_delay is " + std::to_string(options.rom_delay.count()) +
                                " microseconds, expected at least 0");
  }
  const bool qnn = options.provider == Provider::qnn;
  if (!qnn && !options.soc.empty()) {
    throw std::invalid_argument("soc is \"" + options.soc + "\", which only the provider qnn can run on");
  }
  Manifest manifest = Manifest::open(directory);
  return tried(qnn ? open_qnn(std::move(manifest), options, threads) : open_cpu(std::move(manifest), options, threads));
}

std::shared_ptr<const Engine> Engine::tried(std::shared_ptr<Engine> engine) {
  if (engine->shared_memory()) {
    try {
      run_once(engine);
      return engine;
    } catch (const std::runtime_error&) {  // not allocated, not registered, or an error that comes again
      engine->static_model_->shared_memory = false;
    }
  }
  run_once(engine);
  return engine;
}

Engine::Engine(Manifest manifest, std::shared_ptr<const RowSource> rows, const GraphLoader& load, int threads,
               KvType kv_type)
    : manifest_(std::move(manifest)), rows_(std::move(rows)), threads_(threads), kv_type_(kv_type) {
  for (const StageInfo& info : manifest_.stages) {
    stages_.push_back({load(manifest_.directory / info.file), info.rows});
  }
  hidden_names_ = check_stages(manifest_, stages_);
}

Engine::Engine(Manifest manifest, std::shared_ptr<const RowSource> rows, StaticModel model, int threads)
    : manifest_(std::move(manifest)),
      rows_(std::move(rows)),
      static_model_(std::move(model)),
      threads_(threads),
      kv_type_(KvType::float16) {}

}  // namespace meki
