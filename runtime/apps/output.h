#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>

#include "runtime/apps/figures.h"

namespace meki::bench {

// The report; docs/benchmark.md lists its fields. load_s: seconds that opening the package took.
nlohmann::ordered_json make_report(const Engine& engine, const Options& options, const Plan& plan, double load_s,
                                   const Figures& figures);

// Throws std::runtime_error if no file can be written at `path`.
void check_writable(const std::filesystem::path& path);
// Writes `bytes` to `path`, which appears whole or not at all. Throws std::runtime_error.
void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes);

}  // namespace meki::bench
