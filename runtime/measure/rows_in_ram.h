#pragma once

#include <memory>

#include "runtime/engine/session.h"

namespace meki::bench {

// `engine` over again on the same backend, and so the same weights, with every row read into memory beforehand and kept
// as it is stored: what `engine` is measured beside, to learn what reading rows from storage costs.
//
// Not an option of the engine: a program that has as much memory to spare has the rows in the system's page cache
// without asking, and there the system may take it back. What is measured needs memory that it may not.
//
// Calls `poll` between two rows, which may throw to interrupt. Throws std::invalid_argument for a dense model,
// std::runtime_error if the system does not give the memory, PackageError for a damaged row.
std::shared_ptr<const Engine> with_rows_in_ram(const std::shared_ptr<const Engine>& engine, const Session::Poll& poll);

}  // namespace meki::bench
