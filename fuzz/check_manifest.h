#pragma once

#include <string_view>

#include "fuzz/target.h"

namespace meki::fuzz {

// Opens `text` as a manifest.json. Where it is accepted, what the rest of the runtime relies on must hold.
void check_manifest(std::string_view text);

}  // namespace meki::fuzz
