#include "runtime/apps/output.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "runtime/base/file.h"
#include "runtime/graph/graph.h"
#include "runtime/kernels/simd/simd.h"

namespace meki::bench {
namespace {

using Json = nlohmann::ordered_json;

template <class T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

// 0 or errno.
int write_and_rename(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  const std::string temporary = path.string() + "." + std::to_string(::getpid()) + ".tmp";
  std::FILE* const file = std::fopen(temporary.c_str(), "wbx");
  if (file == nullptr) return errno;
  int error = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() ? 0 : errno;
  if (std::fclose(file) != 0 && error == 0) error = errno;
  if (error == 0 && std::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) std::remove(temporary.c_str());
  return error;
}

}  // namespace

Json make_report(const Engine& engine, const Options& options, const Plan& plan, double load_s,
                 const Figures& figures) {
  const auto manifest = Json::parse(engine.manifest().json);
  const RowSource* const rows = engine.rows().get();
  const BackendInfo& backend = engine.backend().info();
  const bool qnn = backend.provider == Provider::qnn;
  const auto& memory = figures.memory;
  return {
      {"program", "meki_bench"},
      {"version", MEKI_VERSION},
      {"model", engine.manifest().name},
      {"random_weights", manifest.value("/provenance/weights"_json_pointer, "") == "random"},
      {"provider", name_of(backend.provider)},
      {"simulated", backend.simulated},
      {"shared_memory", backend.shared_memory},
      {"soc", qnn ? Json(backend.soc) : Json()},
      {"precision", qnn ? Json(engine.manifest().qnn.at(backend.soc).precision) : Json()},
      {"weights", qnn ? Json() : manifest.value("/weights/type"_json_pointer, Json())},
      {"memory", rows != nullptr ? engine.manifest().memory->kind : "dense"},
      {"rom", rows == nullptr ? Json() : Json(plan.cold ? "cold" : "warm")},
      {"rom_access", rows == nullptr ? Json() : Json(rows->access())},
      {"row_cache_mib", rows == nullptr ? Json() : Json(options.engine.row_cache >> 20)},
      {"kv_type", name_of(backend.kv_type)},
      // What computes on qnn is the NPU, whatever the CPU has.
      {"threads", qnn ? Json() : Json(engine.threads())},
      {"simd", qnn ? Json() : Json(simd().name)},
      {"onnxruntime", onnxruntime_version(options.engine.onnxruntime)},
      {"depth", plan.depths.front()},
      {"synthetic_depth", plan.depths.front() > 1},
      {"tokens", plan.tokens},
      {"prefill_tokens", plan.prefill},
      {"repetitions", plan.repetitions},
      {"load_s", load_s},
      {"decode_tokens_per_s", figures.decode_tokens_per_s},
      {"prefill_tokens_per_s", figures.prefill_tokens_per_s},
      {"stall_us", figures.stall_us},
      {"row_hit_rate", or_null(figures.row_hit_rate)},
      {"storage_bytes_per_token", or_null(figures.storage_bytes_per_token)},
      {"resident_bytes", memory ? Json(memory->resident) : Json()},
      {"resident_without_rom_bytes", memory ? Json(memory->without_rom()) : Json()},
      {"peak_resident_bytes", memory ? Json(memory->peak) : Json()},
  };
}

void check_writable(const std::filesystem::path& path) {
  const std::filesystem::path directory = path.has_parent_path() ? path.parent_path() : ".";
  int error = ::access(directory.c_str(), W_OK | X_OK) == 0 ? 0 : errno;
  if (error == 0 && std::filesystem::is_directory(path)) error = EISDIR;
  if (error != 0) throw std::runtime_error(path.string() + ": cannot write: " + system_reason(error));
}

void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  const int error = write_and_rename(path, bytes);
  if (error != 0) throw std::runtime_error(path.string() + ": cannot write: " + system_reason(error));
}

}  // namespace meki::bench
