// runtime/engine: opening a package.

#include "runtime/engine/engine.h"

#include <stdexcept>

#include "runtime/base/error.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;
using test::TempDir;

TEST_CASE("engine: opening a package") {
  const TempDir dir;
  test::write_manifest(dir.path(), test::write_package_files(dir.path()));
  check_names(error_of<std::runtime_error>([&] { Engine::open(dir.path(), {.onnxruntime = dir / "missing.so"}); }),
              "missing.so");
  // A library, but not of ONNX Runtime.
  CHECK_THROWS_AS(Engine::open(dir.path(), {.onnxruntime = "libm.so.6"}), std::runtime_error);
  for (const int threads : {-1, 1'000'000}) {
    check_names(error_of<std::invalid_argument>(
                    [&] { Engine::open(dir.path(), {.onnxruntime = "libm.so.6", .threads = threads}); }),
                "threads");
  }
  check_names(error_of<PackageError>([&] { Engine::open(dir / "missing", {.onnxruntime = "libm.so.6"}); }), "missing");
}

}  // namespace
}  // namespace meki
