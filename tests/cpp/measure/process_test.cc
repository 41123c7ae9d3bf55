// runtime/measure/process.h on this system. A file's share of the resident memory: tests/python/test_bench_machine.py.

#include "runtime/measure/process.h"

#include <doctest/doctest.h>

namespace meki {
namespace {

TEST_CASE("process: resident memory is made of its kinds") {
  const auto memory = bench::resident_memory();
  REQUIRE(memory.has_value());
  CHECK(memory->anonymous > 0);
  CHECK(memory->resident <= memory->peak);
  CHECK(memory->resident == memory->anonymous + memory->file + memory->shared);
  CHECK_FALSE(memory->rom.has_value());
  CHECK(bench::resident_memory("/no/such/file")->rom == 0);
}

}  // namespace
}  // namespace meki
