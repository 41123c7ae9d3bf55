#include "runtime/base/control_groups.h"

#include <fstream>
#include <sstream>
#include <string>

namespace meki {
namespace {

// Whether `controller` is one of those between commas.
bool contains(const std::string& controllers, std::string_view controller) {
  std::istringstream names(controllers);
  for (std::string name; std::getline(names, name, ',');) {
    if (name == controller) return true;
  }
  return false;
}

}  // namespace

std::vector<std::filesystem::path> control_groups(std::string_view controller, const std::filesystem::path& root,
                                                  const std::filesystem::path& self) {
  std::vector<std::filesystem::path> found;
  std::ifstream groups(self);
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !contains(controllers, controller)) continue;
    const std::filesystem::path mount = controllers.empty() ? root : root / controllers;
    // A container may see the path that its host has: then its own group is the mount itself.
    for (auto path = std::filesystem::path(line.substr(second + 1)).relative_path();; path = path.parent_path()) {
      found.push_back(mount / path);
      if (path.empty()) break;
    }
  }
  return found;
}

}  // namespace meki
