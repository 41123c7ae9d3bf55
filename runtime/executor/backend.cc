#include "runtime/executor/backend.h"

#include <stdexcept>

namespace meki {

std::string_view name_of(Provider provider) { return provider == Provider::qnn ? "qnn" : "cpu"; }

Provider parse_provider(std::string_view name) {
  for (const Provider provider : {Provider::cpu, Provider::qnn}) {
    if (name == name_of(provider)) return provider;
  }
  throw std::invalid_argument("provider is \"" + std::string(name) + "\", expected cpu or qnn");
}

}  // namespace meki
