#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>

namespace meki {

// Raises what a signal's handler raises, KeyboardInterrupt for example. To be called between steps, without the GIL.
void poll_signals();

// The bytes of a buffer whose elements are neighbours. Throws std::invalid_argument for another one.
std::span<const std::byte> bytes_of(const pybind11::buffer_info& info);

// The parts of the module that are in files of their own.
void bind_session(pybind11::module_& m);
void bind_measure(pybind11::module_& m);

}  // namespace meki
