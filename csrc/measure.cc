// Measuring, for meki.bench: types, docstrings and the GIL, no logic.

#include "runtime/measure/measure.h"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/bindings.h"
#include "runtime/measure/bandwidth.h"
#include "runtime/measure/process.h"
#include "runtime/measure/rows_in_ram.h"

namespace py = pybind11;
using namespace py::literals;

namespace meki {
namespace {

using namespace bench;

std::optional<py::dict> as_dict(const std::optional<ResidentMemory>& memory) {
  if (!memory) return std::nullopt;
  py::dict dict("resident"_a = memory->resident, "anonymous"_a = memory->anonymous, "file"_a = memory->file,
                "shared"_a = memory->shared, "peak"_a = memory->peak);
  if (memory->rom) {
    dict["rom"] = *memory->rom;
    dict["without_rom"] = memory->without_rom();
  }
  return dict;
}

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", "What to measure. Counts are of tokens.")
      .def(py::init([](std::vector<size_t> depths, size_t prefill, size_t tokens, size_t repetitions,
                       bool synthetic_depth, bool compare, bool cold) {
             return Plan{.depths = std::move(depths),
                         .prefill = prefill,
                         .tokens = tokens,
                         .repetitions = repetitions,
                         .synthetic_depth = synthetic_depth,
                         .compare = compare,
                         .cold = cold};
           }),
           py::kw_only(), "depths"_a, "prefill"_a, "tokens"_a, "repetitions"_a, "synthetic_depth"_a = false,
           "compare"_a = false, "cold"_a = false,
           "depths: in the cache when decode begins. prefill: 0 for none. tokens: decode steps of each contender in "
           "one\n"
           "run of a test, at least 1; to compare, a multiple of GROUP. repetitions: rounds. compare: two contenders,\n"
           "which take turns; if not, each of any number makes all of its steps in a row. cold: drop the contenders'\n"
           "rows from the page cache before every step.")
      .def_readonly_static("TURN", &Plan::kTurn,
                           "Decode steps that a contender measures before it is the other one's turn.")
      .def_readonly_static("GROUP", &Plan::kGroup, "Steps of each contender in one group of turns, A B B A.")
      .def_readonly("depths", &Plan::depths)
      .def_readonly("prefill", &Plan::prefill)
      .def_readonly("tokens", &Plan::tokens)
      .def_readonly("repetitions", &Plan::repetitions)
      .def_readonly("synthetic_depth", &Plan::synthetic_depth)
      .def_readonly("compare", &Plan::compare)
      .def_property_readonly("turn", &Plan::turn, "Decode steps in a row.")
      .def_property_readonly("units", &Plan::units, "How often measure() calls `progress`.")
      .def("context", &Plan::context, "depth"_a, "Context that the test of decode at `depth` needs.");
}

void bind_results(py::module_& m) {
  py::class_<Block>(m, "Block", "What one prefill, or some decode steps in a row, took.")
      .def_readonly("tokens", &Block::tokens)
      .def_readonly("ns", &Block::ns, "Inside the engine, without Python.")
      .def_readonly("sample_ns", &Block::sample_ns, "Of `ns`: in the sampler.")
      .def_readonly("stall_ns", &Block::stall_ns,
                    "The wait for rows: of each decode step, or of a prefill the mean of its tokens; empty in a dense\n"
                    "model.")
      .def_property_readonly(
          "rom_requests", [](const Block& block) { return block.rows.requests; }, "As of Stats.")
      .def_property_readonly(
          "rom_hits", [](const Block& block) { return block.rows.hits; }, "As of Stats.")
      .def_readonly("storage_bytes", &Block::storage_bytes,
                    "What the whole process fetched from storage meanwhile; None: the system does not tell.");
  py::class_<Case>(m, "Case", "A test: prefill of `tokens` tokens, or as many decode steps, from `depth` tokens on.")
      .def_readonly("kind", &Case::kind, "\"prefill\" or \"decode\".")
      .def_readonly("depth", &Case::depth)
      .def_readonly("tokens", &Case::tokens)
      .def_readonly("kv_bytes", &Case::kv_bytes,
                    "Bytes of keys and values that a decode step reads in the middle of the test; None for prefill.");
  py::class_<Measurement>(m, "Measurement", "What measure() found.")
      .def_readonly("cases", &Measurement::cases)
      .def_readonly("rounds", &Measurement::rounds, "[repetition][case][contender]: blocks, one a turn.")
      .def_readonly(
          "bandwidths", &Measurement::bandwidths,
          "Bytes/s before the first round and after each, by the number of threads, for each that a contender has.")
      .def_property_readonly(
          "memory", [](const Measurement& measurement) { return as_dict(measurement.memory); },
          "resident_memory() after every test has run once.");
}

}  // namespace

void bind_measure(py::module_& m) {
  bind_plan(m);
  bind_results(m);
  m.def(
      "measure",
      [](const std::vector<std::shared_ptr<Engine>>& engines, const Plan& plan,
         const std::function<void(const std::string&)>& progress, size_t bandwidth_bytes) {
        const std::vector<std::shared_ptr<const Engine>> contenders(engines.begin(), engines.end());
        const auto bandwidth = [&](size_t threads) { return read_bandwidth(threads, bandwidth_bytes); };
        return measure(contenders, plan, {.poll = poll_signals, .progress = progress, .read_bandwidth = bandwidth});
      },
      "engines"_a, "plan"_a, "progress"_a, "bandwidth_bytes"_a, py::call_guard<py::gil_scoped_release>(),
      "Runs every test once to warm up, then `plan.repetitions` rounds of all tests; before the first round and after\n"
      "each, reads `bandwidth_bytes` of memory with as many threads as a contender has. `progress` is told what comes "
      "next. KeyboardInterrupt is raised\n"
      "between two steps. ValueError for a plan that does not fit the number of engines, its contenders.");
  m.def(
      "with_rows_in_ram",
      [](const std::shared_ptr<Engine>& engine) {
        return std::const_pointer_cast<Engine>(with_rows_in_ram(engine, poll_signals));
      },
      "engine"_a, py::call_guard<py::gil_scoped_release>(),
      "The same engine on the same weights, with every row in memory: what reading them from storage is measured\n"
      "beside, and nothing that meki.Engine offers. Takes the ROM's size of memory. ValueError for a dense model,\n"
      "RuntimeError if there is not as much, PackageError for a damaged row.");
  m.def(
      "profile_decode",
      [](const std::shared_ptr<Engine>& engine, const Plan& plan, size_t depth) {
        Profile profile = profile_decode(engine, plan, depth, poll_signals);
        return std::pair(std::move(profile.block), std::move(profile.history));
      },
      "engine"_a, "plan"_a, "depth"_a, py::call_guard<py::gil_scoped_release>(),
      "`plan.tokens` decode steps in one block, from a cache that is filled with `depth` tokens; and for every step "
      "of\n"
      "one token that was made, the last ones of the engine: whether the block counts it.");
  m.def(
      "resident_memory", [](const std::optional<std::filesystem::path>& rom) { return as_dict(resident_memory(rom)); },
      "rom"_a,
      "Bytes of this process: \"resident\", of it \"anonymous\" (heap and caches), \"file\" (mapped files) and\n"
      "\"shared\"; \"peak\", the greatest that \"resident\" ever was; and \"rom\", what of \"file\" is the file "
      "`rom`,\n"
      "with \"without_rom\", what of \"resident\" is not. None where the system does not tell.");
}

}  // namespace meki
