#include "runtime/engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <span>
#include <stdexcept>

#include "runtime/base/cpus.h"
#include "runtime/engine/session.h"
#include "runtime/executor/compiled.h"
#include "runtime/executor/dynamic.h"
#include "runtime/graph/qnn.h"
#include "runtime/rows/delayed_rows.h"
#include "runtime/rows/open_rows.h"
#include "runtime/rows/row_cache.h"

namespace meki {
namespace {

constexpr int kMaxThreads = 1024;

// More threads than CPUs would take the time from each other at every operator.
int resolve_threads(int threads) {
  if (threads < 0 || threads > kMaxThreads) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 0 to " +
                                std::to_string(kMaxThreads));
  }
  return threads > 0 ? std::min(threads, affinity_cpus()) : available_cpus();
}

// One token through all stages, and compiled ones with two tokens as well: ONNX Runtime checks every type and shape
// that the manifest promised, and the weights that the first real step needs are brought into memory.
void warm_up(const std::shared_ptr<const Engine>& engine) {
  const BackendInfo& info = engine->backend().info();
  const std::array<int64_t, 2> tokens = {0, 0};
  Session session(engine, {.context = std::min<size_t>(info.context, 8), .chunk = 2});
  const bool prefill = info.provider == Provider::qnn && session.context() > 1;
  for (size_t count = prefill ? 2 : 1; count > 0; --count) {
    session.rewind(0);
    session.append(std::span(tokens).first(count));
    session.compute();
  }
}

std::shared_ptr<const Backend> open_cpu(Manifest manifest, const EngineOptions& options, int threads) {
  manifest.check_files();
  if (!options.memory) manifest = manifest.without_memory();
  const KvType kv_type = options.kv_type.value_or(KvType::int8);
  // Where weights are packed, all that takes time is operators of ours: more threads would only take memory.
  const int graph_threads = manifest.weight_type == "float32" ? threads : 1;
  const GraphLoader load = onnxruntime_loader(options.onnxruntime, {threads, graph_threads, kv_type, options.profile});
  return std::make_shared<DynamicBackend>(manifest, kv_type, load);
}

std::shared_ptr<const Backend> open_qnn(Manifest manifest, const EngineOptions& options, int threads) {
  if (options.kv_type.value_or(KvType::float16) != KvType::float16) {
    throw std::invalid_argument("kv_type is " + std::string(name_of(*options.kv_type)) +
                                ", expected float16: compiled stages keep keys and values in no other type");
  }
  const std::string soc = manifest.find_target(options.soc);
  manifest.check_target_files(soc);
  if (!options.memory) {
    if (manifest.memory && manifest.qnn.at(soc).dense_decode.empty()) {
      const std::string package = manifest.directory.string();
      throw std::invalid_argument(package + ": compiled without its dense variant; run meki-compile " + package +
                                  " --soc " + soc + " --dense");
    }
    manifest = manifest.without_memory();
  }
  const QnnTarget& target = manifest.qnn.at(soc);
  const GraphLoader cpu = onnxruntime_loader(options.onnxruntime, {threads, 1, KvType::float16, options.profile});
  const GraphLoader qnn = qnn_loader(options.onnxruntime, options.qnn_library,
                                     {.soc_model = target.soc_model,
                                      .htp_arch = target.htp_arch,
                                      .shared_memory = !qnn_is_simulated(),  // the simulator has none
                                      .profile = options.profile});
  return CompiledBackend::load(manifest, soc, qnn_is_simulated(), cpu, qnn);
}

}  // namespace

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
  auto backend =
      qnn ? open_qnn(std::move(manifest), options, threads) : open_cpu(std::move(manifest), options, threads);
  auto rows = open_rows(backend->manifest(), options.rom_access);
  if (rows != nullptr && options.rom_delay.count() > 0) {
    rows = std::make_shared<DelayedRows>(std::move(rows), options.rom_delay);
  }
  if (rows != nullptr) rows = with_row_cache(std::move(rows), options.row_cache);
  return make(rows, backend, threads);
}

Engine::Engine(std::shared_ptr<const RowSource> rows, std::shared_ptr<const Backend> backend, int threads)
    : rows_(std::move(rows)), backend_(std::move(backend)), threads_(threads), process_(::getpid()) {}

void Engine::check_process() const {
  if (::getpid() == process_) return;
  throw std::runtime_error("the engine belongs to process " + std::to_string(process_) +
                           ", which this one was forked from without its threads; open an engine here");
}

bool Engine::run_batch(std::span<BatchMember> members) const {
  const std::lock_guard lock(batch_mutex_);
  if (batch_ == nullptr) batch_ = backend_->batch_executor();
  if (batch_ == nullptr) return false;
  batch_->run(members);
  return true;
}

std::shared_ptr<const Engine> Engine::make(const std::shared_ptr<const RowSource>& rows,
                                           const std::shared_ptr<const Backend>& backend, int threads) {
  auto engine = std::make_shared<const Engine>(rows, backend, threads);
  if (const auto fallback = backend->fallback()) {
    try {
      warm_up(engine);
      return engine;
    } catch (const std::runtime_error&) {  // what the fallback cures, or an error that comes again
      engine = std::make_shared<const Engine>(rows, fallback, threads);
    }
  }
  warm_up(engine);
  return engine;
}

}  // namespace meki
