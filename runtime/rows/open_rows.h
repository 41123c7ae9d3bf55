#pragma once

#include <memory>

#include "runtime/package/manifest.h"
#include "runtime/rows/row_source.h"
#include "runtime/rows/token_table.h"

namespace meki {

// Opens the file of memory rows that the manifest names, as the manifest's address says, and checks that it is the one
// that the manifest describes. Null for a dense model. Throws PackageError.
std::shared_ptr<const RowSource> open_rows(const Manifest& manifest, RomAccess access);

}  // namespace meki
