// The Python face of the runtime: types and the GIL, no logic. Documented in python/meki/_core.pyi.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/file.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/sampler.h"
#include "runtime/engine/session.h"
#include "runtime/kernels/simd/simd.h"
#include "runtime/measure/bandwidth.h"
#include "runtime/package/manifest.h"
#include "runtime/rows/open_rows.h"
#include "runtime/rows/token_table.h"

namespace py = pybind11;
using namespace py::literals;

namespace meki {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Lets Ctrl-C through between two prefill steps.
void poll_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Makes a second thread that enters a session an error instead of a data race.
class GuardedSession {
 public:
  GuardedSession(std::shared_ptr<const Engine> engine, const SessionOptions& options)
      : vocab_size_(engine->manifest().architecture.vocab_size), session_(std::move(engine), options) {}

  // Runs `work(session)` without the GIL.
  template <class Work>
  auto call(Work work) {
    const py::gil_scoped_release release;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) throw std::runtime_error("this session is in use by another thread; give every thread its own session");
    return work(session_);
  }
  py::array_t<float> logits() {
    const size_t pending = call([](Session& session) { return session.pending(); });
    py::array_t<float> out({pending, vocab_size_});
    float* data = out.mutable_data();
    call([data, pending](Session& session) {
      if (session.pending() != pending) throw std::runtime_error("this session is in use by another thread");
      session.logits(data, poll_signals);
    });
    return out;
  }

 private:
  size_t vocab_size_;
  std::mutex mutex_;
  Session session_;
};

std::optional<std::string> finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::eos: return "eos";
    case FinishReason::length: return "length";
    case FinishReason::context: return "context";
    case FinishReason::running: break;
  }
  return std::nullopt;
}

void check_id(int64_t id, uint64_t vocab_size) {
  if (id < 0 || static_cast<uint64_t>(id) >= vocab_size) {
    throw std::invalid_argument("token id " + std::to_string(id) + " is outside the vocabulary, expected 0 to " +
                                std::to_string(vocab_size - 1));
  }
}

FloatArray rom_rows(const TokenTable& rom, const std::vector<int64_t>& ids) {
  const RomHeader& header = rom.header();
  for (const int64_t id : ids) check_id(id, header.vocab_size);
  FloatArray out({size_t{header.layers}, ids.size(), size_t{header.row_dim}});
  float* data = out.mutable_data();
  const py::gil_scoped_release release;
  const Mapping scratch = Mapping::zeroed(rom.scratch_bytes());
  for (size_t i = 0; i < ids.size(); ++i) {
    rom.read(static_cast<uint64_t>(ids[i]), {scratch.data(), scratch.size()}, data + i * header.row_dim,
             ids.size() * header.row_dim);
  }
  return out;
}

void rom_verify(const TokenTable& rom, uint64_t first, uint64_t count) {
  const uint64_t vocab_size = rom.header().vocab_size;
  if (first > vocab_size || count > vocab_size - first) {
    throw std::invalid_argument("tokens " + std::to_string(first) + " to " + std::to_string(first + count) +
                                " exceed the vocabulary of " + std::to_string(vocab_size));
  }
  const py::gil_scoped_release release;
  const Mapping scratch = Mapping::zeroed(rom.scratch_bytes());
  for (uint64_t token = first; token < first + count; ++token) {
    rom.read_bundle(token, {scratch.data(), scratch.size()});
  }
}

void bind_errors(py::module_& m) {
  static PyObject* package_error = nullptr;
  package_error = py::exception<PackageError>(m, "PackageError", PyExc_OSError).release().ptr();
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const PackageError& error) {
      // A damaged file may put bytes into the message that are not UTF-8.
      const std::string text = error.what();
      const auto size = static_cast<Py_ssize_t>(text.size());
      PyErr_SetObject(
          package_error,
          py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(text.data(), size, "backslashreplace")).ptr());
    }
  });
}

void bind_options(py::module_& m) {
  py::class_<EngineOptions>(m, "EngineOptions")
      .def(py::init([](std::filesystem::path onnxruntime, int threads, const std::string& rom_access,
                       const std::optional<std::string>& kv_type, bool memory, int64_t rom_delay_us,
                       std::filesystem::path profile, const std::string& provider, std::filesystem::path qnn_library,
                       std::string soc) {
             return EngineOptions{.onnxruntime = std::move(onnxruntime),
                                  .threads = threads,
                                  .rom_access = parse_rom_access(rom_access),
                                  .kv_type = kv_type ? std::optional(parse_kv_type(*kv_type)) : std::nullopt,
                                  .memory = memory,
                                  .rom_delay = std::chrono::microseconds(rom_delay_us),
                                  .profile = std::move(profile),
                                  .provider = parse_provider(provider),
                                  .qnn_library = std::move(qnn_library),
                                  .soc = std::move(soc)};
           }),
           py::kw_only(), "onnxruntime"_a, "threads"_a = 0, "rom_access"_a = name_of(EngineOptions().rom_access),
           "kv_type"_a = py::none(), "memory"_a = true, "rom_delay_us"_a = 0, "profile"_a = "",
           "provider"_a = name_of(EngineOptions().provider), "qnn_library"_a = "", "soc"_a = "")
      .def_property_readonly("onnxruntime", [](const EngineOptions& o) { return o.onnxruntime.string(); })
      .def_readonly("threads", &EngineOptions::threads)
      .def_property_readonly("rom_access", [](const EngineOptions& o) { return name_of(o.rom_access); })
      .def_property_readonly(
          "kv_type",
          [](const EngineOptions& o) { return o.kv_type ? std::optional(name_of(*o.kv_type)) : std::nullopt; })
      .def_property_readonly("provider", [](const EngineOptions& o) { return name_of(o.provider); })
      .def_readonly("soc", &EngineOptions::soc);

  const SessionOptions session;
  py::class_<SessionOptions>(m, "SessionOptions")
      .def(py::init(
               [](size_t context, bool prefetch, size_t chunk) { return SessionOptions{context, prefetch, chunk}; }),
           py::kw_only(), "context"_a = session.context, "prefetch"_a = session.prefetch, "chunk"_a = session.chunk)
      .def_readonly("context", &SessionOptions::context)
      .def_readonly("prefetch", &SessionOptions::prefetch)
      .def_readonly("chunk", &SessionOptions::chunk);

  const SamplingOptions sampling;
  py::class_<SamplingOptions>(m, "SamplingOptions")
      .def(py::init([](double temperature, uint32_t top_k, double top_p, double min_p, double repetition_penalty,
                       uint64_t seed) {
             return SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty, seed};
           }),
           py::kw_only(), "temperature"_a = sampling.temperature, "top_k"_a = sampling.top_k,
           "top_p"_a = sampling.top_p, "min_p"_a = sampling.min_p, "repetition_penalty"_a = sampling.repetition_penalty,
           "seed"_a = sampling.seed)
      .def_readonly("temperature", &SamplingOptions::temperature)
      .def_readonly("top_k", &SamplingOptions::top_k)
      .def_readonly("top_p", &SamplingOptions::top_p)
      .def_readonly("min_p", &SamplingOptions::min_p)
      .def_readonly("repetition_penalty", &SamplingOptions::repetition_penalty)
      .def_readonly("seed", &SamplingOptions::seed);
}

void bind_rom(py::module_& m) {
  py::class_<RomHeader>(m, "RomInfo")
      .def_readonly("vocab_size", &RomHeader::vocab_size)
      .def_readonly("layers", &RomHeader::layers)
      .def_readonly("row_dim", &RomHeader::row_dim)
      .def_property_readonly("row_type", [](const RomHeader& header) { return name_of(header.row_type); })
      .def_readonly("bundle_bytes", &RomHeader::bundle_bytes)
      .def_readonly("bundle_stride", &RomHeader::bundle_stride)
      .def_readonly("file_bytes", &RomHeader::file_bytes)
      .def_readonly("content_id", &RomHeader::content_id);

  py::class_<TokenTable>(m, "Rom")
      .def(py::init([](const std::filesystem::path& path, const std::string& access) {
             const py::gil_scoped_release release;
             return std::make_unique<TokenTable>(path, parse_rom_access(access));
           }),
           "path"_a, "access"_a = name_of(EngineOptions().rom_access))
      .def_property_readonly("info", &TokenTable::header, py::return_value_policy::copy)
      .def_property_readonly("access", &TokenTable::access)
      .def("rows", &rom_rows, "token_ids"_a)
      .def("verify", &rom_verify, "first"_a, "count"_a);
}

void bind_engine(py::module_& m) {
  py::class_<Sampler>(m, "Sampler")
      .def(py::init<const SamplingOptions&, size_t>(), "options"_a, "vocab_size"_a)
      .def(
          "sample",
          [](Sampler& sampler, const FloatArray& logits, const std::vector<int32_t>& sequence) {
            for (const int32_t id : sequence) check_id(id, static_cast<uint64_t>(logits.size()));
            return sampler.sample({logits.data(), static_cast<size_t>(logits.size())}, sequence);
          },
          "logits"_a, "sequence"_a);

  // Engines are shared and immutable; pybind11's holder has no const.
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def_static(
          "open",
          [](const std::filesystem::path& path, const EngineOptions& options) {
            return std::const_pointer_cast<Engine>(Engine::open(path, options));
          },
          "path"_a, "options"_a, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.manifest().architecture.vocab_size; })
      .def_property_readonly("context", [](const Engine& e) { return e.context(); })
      .def_property_readonly("eos_token_ids", [](const Engine& e) { return e.manifest().eos_token_ids; })
      .def_property_readonly(
          "rom_access", [](const Engine& e) { return e.rows() ? std::optional(e.rows()->access()) : std::nullopt; })
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("kv_type", [](const Engine& e) { return name_of(e.kv_type()); })
      .def_property_readonly("provider", [](const Engine& e) { return name_of(e.provider()); })
      .def_property_readonly("simulated", &Engine::simulated)
      .def_property_readonly("shared_memory", &Engine::shared_memory)
      .def_property_readonly("soc",
                             [](const Engine& e) { return e.soc().empty() ? std::nullopt : std::optional(e.soc()); })
      .def("drop_rom_cache", [](const Engine& e) {
        if (e.rows()) e.rows()->drop_cache();
      });

  py::class_<Stats>(m, "Stats")
      .def_readonly("prefill_tokens", &Stats::prefill_tokens)
      .def_readonly("prefill_ns", &Stats::prefill_ns)
      .def_readonly("prefill_stall_ns", &Stats::prefill_stall_ns)
      .def_readonly("decode_tokens", &Stats::decode_tokens)
      .def_readonly("decode_ns", &Stats::decode_ns)
      .def_readonly("sample_ns", &Stats::sample_ns)
      .def_readonly("stall_ns", &Stats::stall_ns)
      .def_property_readonly("rom_requests", [](const Stats& stats) { return stats.rom.requests; })
      .def_property_readonly("rom_bytes", [](const Stats& stats) { return stats.rom.bytes; });

  py::class_<GuardedSession>(m, "Session")
      .def(py::init([](const std::shared_ptr<Engine>& engine, const SessionOptions& options) {
             const py::gil_scoped_release release;
             return std::make_unique<GuardedSession>(engine, options);
           }),
           "engine"_a, "options"_a)
      .def_property_readonly("context",
                             [](GuardedSession& s) { return s.call([](Session& x) { return x.context(); }); })
      .def_property_readonly(
          "tokens",
          [](GuardedSession& s) {
            return s.call([](Session& x) { return std::vector<int32_t>(x.tokens().begin(), x.tokens().end()); });
          })
      .def(
          "prompt",
          [](GuardedSession& s, const std::vector<int64_t>& ids) { s.call([&ids](Session& x) { x.prompt(ids); }); },
          "token_ids"_a)
      .def(
          "start",
          [](GuardedSession& s, const SamplingOptions& sampling, size_t max_new_tokens) {
            s.call([&](Session& x) { x.start(sampling, max_new_tokens); });
          },
          "sampling"_a, "max_new_tokens"_a)
      .def("next", [](GuardedSession& s) { return s.call([](Session& x) { return x.next(poll_signals); }); })
      .def_property_readonly(
          "finish_reason",
          [](GuardedSession& s) { return finish_name(s.call([](Session& x) { return x.finish_reason(); })); })
      .def("logits", &GuardedSession::logits)
      .def(
          "rewind", [](GuardedSession& s, size_t length) { s.call([length](Session& x) { x.rewind(length); }); },
          "length"_a)
      .def(
          "fill_synthetic",
          [](GuardedSession& s, size_t count) { s.call([count](Session& x) { x.fill_synthetic(count); }); }, "count"_a)
      .def(
          "kv_bytes",
          [](GuardedSession& s, size_t tokens) { return s.call([tokens](Session& x) { return x.kv_bytes(tokens); }); },
          "tokens"_a)
      .def_property_readonly("stats", [](GuardedSession& s) { return s.call([](Session& x) { return x.stats(); }); })
      .def("reset_stats", [](GuardedSession& s) { s.call([](Session& x) { x.reset_stats(); }); });
}

}  // namespace
}  // namespace meki

PYBIND11_MODULE(_core, m) {
  meki::bind_errors(m);
  meki::bind_options(m);
  meki::bind_rom(m);
  meki::bind_engine(m);
  m.def("cpu_kernels", [] { return meki::simd().name; });
  m.def("read_bandwidth", &meki::read_bandwidth, "threads"_a, "bytes"_a, py::call_guard<py::gil_scoped_release>());
  m.def(
      "read_manifest",
      [](const std::filesystem::path& path, const std::string& provider, const std::string& soc) {
        const meki::Manifest manifest = meki::Manifest::open(path);
        if (meki::parse_provider(provider) == meki::Provider::qnn) {
          manifest.check_target_files(soc);
        } else {
          manifest.check_files();
        }
        meki::open_rows(manifest, meki::RomAccess::pread);
        return manifest.json;
      },
      "path"_a, "provider"_a = "cpu", "soc"_a = "", py::call_guard<py::gil_scoped_release>());
}
