// The Python face of the runtime: types, docstrings and the GIL, no logic. python/meki/_core.pyi is made of it
// (docs/development.md).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/bindings.h"
#include "runtime/base/crc32c.h"
#include "runtime/base/error.h"
#include "runtime/base/file.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/sampler.h"
#include "runtime/kernels/simd/simd.h"
#include "runtime/package/manifest.h"
#include "runtime/rows/open_rows.h"
#include "runtime/rows/token_table.h"

namespace py = pybind11;
using namespace py::literals;

namespace meki {

void poll_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// The bytes of a buffer whose elements are neighbours. Throws std::invalid_argument for another one.
std::span<const std::byte> bytes_of(const py::buffer_info& info) {
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t axis = info.ndim; axis-- > 0; stride *= info.shape[axis]) {
    if (info.shape[axis] > 1 && info.strides[axis] != stride)
      throw std::invalid_argument("a buffer must be contiguous");
  }
  return {static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

namespace {

void rom_verify(const TokenTable& rom, uint64_t first, uint64_t count) {
  const uint64_t entries = rom.header().entries;
  if (first > entries || count > entries - first) {
    throw std::invalid_argument("bundles " + std::to_string(first) + " to " + std::to_string(first + count) +
                                " exceed the file's " + std::to_string(entries));
  }
  const py::gil_scoped_release release;
  const Mapping scratch = Mapping::zeroed(rom.scratch_bytes());
  for (uint64_t token = first; token < first + count; ++token) {
    rom.fetch(token, {scratch.data(), scratch.size()});
  }
}

// Numbers of the parts that each of the tokens needs, int64 [tokens, parts].
py::array_t<int64_t> row_indices(const Engine& engine, const std::vector<int64_t>& token_ids) {
  if (engine.rows() == nullptr) throw std::invalid_argument("the model runs without a memory and so without rows");
  const RowSource& rows = *engine.rows();
  const auto limit = static_cast<int64_t>(engine.manifest().architecture.vocab_size);
  std::vector<int32_t> ids;
  for (const int64_t id : token_ids) {
    if (id < 0 || id >= limit) {
      throw std::invalid_argument("token id " + std::to_string(id) + " is outside the vocabulary, expected 0 to " +
                                  std::to_string(limit - 1));
    }
    ids.push_back(static_cast<int32_t>(id));
  }
  std::vector<RowKey> keys(rows.keys_per_token());
  py::array_t<int64_t> indices({token_ids.size(), keys.size()});
  int64_t* out = indices.mutable_data();
  const py::gil_scoped_release release;
  for (size_t token = 0; token < ids.size(); ++token) {
    rows.keys(std::span(ids).first(token + 1), keys);
    for (const RowKey& key : keys) *out++ = static_cast<int64_t>(key.index);
  }
  return indices;
}

uint32_t crc32c_of(const py::buffer& data) {
  const py::buffer_info info = data.request();
  const std::span<const std::byte> bytes = bytes_of(info);
  const py::gil_scoped_release release;
  return crc32c(bytes);
}

void bind_errors(py::module_& m) {
  static PyObject* package_error = nullptr;
  package_error = py::exception<PackageError>(m, "PackageError", PyExc_OSError).release().ptr();
  py::handle(package_error).doc() =
      "A package, or a file of one, that cannot be used: missing, damaged, inconsistent, or changed while in\n"
      "use.";
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
  py::class_<EngineOptions>(m, "EngineOptions", "How to open a package.")
      .def(py::init([](std::filesystem::path onnxruntime, int threads, const std::string& rom_access,
                       const std::optional<std::string>& kv_type, bool memory, size_t row_cache, int64_t rom_delay_us,
                       std::filesystem::path profile, const std::string& provider, std::filesystem::path qnn_library,
                       std::string soc) {
             return EngineOptions{.onnxruntime = std::move(onnxruntime),
                                  .threads = threads,
                                  .rom_access = parse_rom_access(rom_access),
                                  .kv_type = kv_type ? std::optional(parse_kv_type(*kv_type)) : std::nullopt,
                                  .memory = memory,
                                  .row_cache = row_cache,
                                  .rom_delay = std::chrono::microseconds(rom_delay_us),
                                  .profile = std::move(profile),
                                  .provider = parse_provider(provider),
                                  .qnn_library = std::move(qnn_library),
                                  .soc = std::move(soc)};
           }),
           py::kw_only(), "onnxruntime"_a, "threads"_a = 0, "rom_access"_a = name_of(EngineOptions().rom_access),
           "kv_type"_a = py::none(), "memory"_a = true, "row_cache"_a = EngineOptions().row_cache, "rom_delay_us"_a = 0,
           "profile"_a = "", "provider"_a = name_of(EngineOptions().provider), "qnn_library"_a = "", "soc"_a = "",
           "onnxruntime: path of the ONNX Runtime shared library. qnn_library: with the provider \"qnn\", that of\n"
           "libonnxruntime_providers_qnn.so. row_cache: bytes. rom_delay_us: microseconds that every read of the ROM "
           "takes longer.\n"
           "soc: the compiled chip; empty: the only one there is. The others are as of meki.Engine. ValueError for a\n"
           "name that does not exist.");

  const SamplingOptions sampling;
  py::class_<SamplingOptions>(
      m, "SamplingOptions",
      "How the next token is chosen. Applied in this order: repetition penalty, presence and frequency penalty, logit\n"
      "bias, temperature, top-k, top-p, min-p.")
      .def(py::init([](double temperature, uint32_t top_k, double top_p, double min_p, double repetition_penalty,
                       double presence_penalty, double frequency_penalty,
                       std::vector<std::pair<int32_t, double>> logit_bias, std::optional<uint32_t> logprobs,
                       uint64_t seed) {
             return SamplingOptions{.temperature = temperature,
                                    .top_k = top_k,
                                    .top_p = top_p,
                                    .min_p = min_p,
                                    .repetition_penalty = repetition_penalty,
                                    .presence_penalty = presence_penalty,
                                    .frequency_penalty = frequency_penalty,
                                    .logit_bias = std::move(logit_bias),
                                    .logprobs = logprobs,
                                    .seed = seed};
           }),
           py::kw_only(), "temperature"_a = sampling.temperature, "top_k"_a = sampling.top_k,
           "top_p"_a = sampling.top_p, "min_p"_a = sampling.min_p, "repetition_penalty"_a = sampling.repetition_penalty,
           "presence_penalty"_a = sampling.presence_penalty, "frequency_penalty"_a = sampling.frequency_penalty,
           "logit_bias"_a = py::tuple(), "logprobs"_a = sampling.logprobs, "seed"_a = sampling.seed)
      .def("check", &SamplingOptions::check, "vocab_size"_a,
           "ValueError if an option is outside its range, or a token id outside the vocabulary.")
      .def_readonly("temperature", &SamplingOptions::temperature, "0: the most probable token.")
      .def_readonly("top_k", &SamplingOptions::top_k, "Keep the k most probable tokens; 0: all.")
      .def_readonly("top_p", &SamplingOptions::top_p,
                    "Keep the fewest most probable tokens whose probabilities sum to at least this; 1: all.")
      .def_readonly("min_p", &SamplingOptions::min_p,
                    "Drop tokens less probable than this times the most probable one's; 0: none.")
      .def_readonly("repetition_penalty", &SamplingOptions::repetition_penalty,
                    "Divide positive and multiply negative logits of tokens already in the sequence; 1: off.")
      .def_readonly("presence_penalty", &SamplingOptions::presence_penalty,
                    "Subtracted from logits of tokens that the generation has; 0: off.")
      .def_readonly("frequency_penalty", &SamplingOptions::frequency_penalty,
                    "The same, times how often it has them; 0: off.")
      .def_readonly("logit_bias", &SamplingOptions::logit_bias, "Token ids, and what is added to their logits.")
      .def_readonly("logprobs", &SamplingOptions::logprobs,
                    "Tell log-probabilities, and of how many most probable tokens, at most MOST_LOGPROBS; None: none.")
      .def_property_readonly_static("MOST_LOGPROBS", [](const py::object&) { return kMostLogprobs; })
      .def_readonly("seed", &SamplingOptions::seed, "Seed of the random generator, 0 to 2**64 - 1.");
}

void bind_rom(py::module_& m) {
  py::class_<RomHeader>(m, "RomInfo", "What a ROM's header says (docs/rom-format.md).")
      .def_readonly("entries", &RomHeader::entries)
      .def_readonly("layers", &RomHeader::layers)
      .def_readonly("row_dim", &RomHeader::row_dim)
      .def_property_readonly(
          "row_type", [](const RomHeader& header) { return name_of(header.row_type); },
          "One of \"float32\", \"float16\", \"int8\" and \"int4\".")
      .def_readonly("bundle_bytes", &RomHeader::bundle_bytes)
      .def_readonly("bundle_stride", &RomHeader::bundle_stride)
      .def_readonly("file_bytes", &RomHeader::file_bytes)
      .def_readonly("content_id", &RomHeader::content_id);

  py::class_<TokenTable>(m, "Rom", "A ROM file. Immutable and thread-safe.")
      .def(py::init([](const std::filesystem::path& path) {
             const py::gil_scoped_release release;
             return std::make_unique<TokenTable>(path, RomAccess::pread);
           }),
           "path"_a, "PackageError if the file is not a valid ROM.")
      .def_property_readonly("info", &TokenTable::header, py::return_value_policy::copy)
      .def("verify", &rom_verify, "first"_a, "count"_a,
           "Checks the checksums of `count` bundles from `first` on. PackageError names the first bad bundle.");
}

void bind_engine(py::module_& m) {
  // Engines are shared and immutable; pybind11's holder has no const.
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine", "An opened package. Immutable and thread-safe.")
      .def_static(
          "open",
          [](const std::filesystem::path& path, const EngineOptions& options) {
            return std::const_pointer_cast<Engine>(Engine::open(path, options));
          },
          "path"_a, "options"_a, py::call_guard<py::gil_scoped_release>(),
          "PackageError if the package is unusable; ValueError for bad options, such as a chip that the package is\n"
          "not compiled for; RuntimeError if ONNX Runtime or its provider cannot be loaded.")
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.manifest().architecture.vocab_size; })
      .def_property_readonly(
          "context", [](const Engine& e) { return e.backend().info().context; },
          "Longest sequence that the model supports, in tokens; compiled stages may support less.")
      .def_property_readonly("eos_token_ids", [](const Engine& e) { return e.manifest().eos_token_ids; })
      .def_property_readonly(
          "rom_access", [](const Engine& e) { return e.rows() ? std::optional(e.rows()->access()) : std::nullopt; },
          "The access mode in use, which differs from the requested one after a fallback; None without a memory.")
      .def("row_indices", &row_indices, "token_ids"_a,
           "Numbers in the ROM of the parts that each token of a sequence needs, int64 [tokens, parts]. ValueError\n"
           "without a memory, and for an id out of the vocabulary.")
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("kv_type", [](const Engine& e) { return name_of(e.backend().info().kv_type); })
      .def_property_readonly("provider", [](const Engine& e) { return name_of(e.backend().info().provider); })
      .def_property_readonly(
          "simulated", [](const Engine& e) { return e.backend().info().simulated; },
          "Whether a simulator of the NPU computes: results as on the chip, speed is not.")
      .def_property_readonly(
          "shared_memory", [](const Engine& e) { return e.backend().info().shared_memory; },
          "Whether the KV cache is in memory that the NPU shares; if not, an NPU copies all of it each step.")
      .def_property_readonly(
          "soc",
          [](const Engine& e) {
            const std::string& soc = e.backend().info().soc;
            return soc.empty() ? std::nullopt : std::optional(soc);
          },
          "The chip whose compiled stages run; None with the provider \"cpu\".");
}

}  // namespace
}  // namespace meki

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ engine. Private: use meki.Engine. Every blocking call releases the GIL.";
  meki::bind_errors(m);
  meki::bind_options(m);
  meki::bind_rom(m);
  meki::bind_engine(m);
  meki::bind_session(m);
  meki::bind_measure(m);
  m.def(
      "cpu_kernels", [] { return meki::simd().name; },
      "The instruction set that attention and linear layers use: \"avx512vnni\", \"avx2\", \"neon-i8mm\",\n"
      "\"neon-dotprod\" or \"portable\".");
  m.def("crc32c", &meki::crc32c_of, "data"_a, "CRC-32C (Castagnoli, RFC 3720) of a contiguous buffer.");
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
      "path"_a, "provider"_a = "cpu", "soc"_a = "", py::call_guard<py::gil_scoped_release>(),
      "Checks the package at `path` as Engine.open does with this provider and chip, without loading a graph;\n"
      "returns the manifest's JSON text. With \"cpu\" the compiled files may be missing, with \"qnn\" all but those\n"
      "and the ROM.");
}
