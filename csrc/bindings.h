#pragma once

#include <pybind11/pybind11.h>

namespace meki {

// Raises what a signal's handler raises, KeyboardInterrupt for example. To be called between steps, without the GIL.
void poll_signals();

// The parts of the module that are in files of their own.
void bind_measure(pybind11::module_& m);

}  // namespace meki
