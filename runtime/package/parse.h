#pragma once

// The parts of a manifest that stand in it more than once. All throw PackageError.

#include <map>
#include <string>
#include <vector>

#include "runtime/package/manifest.h"
#include "runtime/package/node.h"

namespace meki {

std::vector<StageInfo> parse_stages(const Node& node, const std::optional<MemoryInfo>& memory);
FileSizes parse_files(const Node& node);
// Checks that the object `files` has an entry for a file that is named elsewhere.
void require_file(const Node& files, const std::string& name);
// The member "qnn". `manifest` has all others.
std::map<std::string, QnnTarget> parse_qnn(const Node& node, const Manifest& manifest);

}  // namespace meki
