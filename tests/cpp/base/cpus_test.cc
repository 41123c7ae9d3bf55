// runtime/base/cpus, on made-up trees of control groups.

#include "runtime/base/cpus.h"

#include <sched.h>

#include "tests/cpp/support.h"

namespace meki {
namespace {

struct Group {
  std::string file;  // below the root, with its directories
  std::string text;
};

// What a tree of control groups leaves of the CPUs that the tests have.
int cpus_with(const std::string& self, const std::vector<Group>& groups) {
  const test::TempDir root;
  test::write_file(root / "self", self);
  for (const auto& [file, text] : groups) {
    std::filesystem::create_directories((root / file).parent_path());
    test::write_file(root / file, text);
  }
  return available_cpus(root.path(), root / "self");
}

int affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  REQUIRE(::sched_getaffinity(0, sizeof(set), &set) == 0);
  return CPU_COUNT(&set);
}

TEST_CASE("available CPUs: the affinity's, where no quota is less") {
  CHECK(cpus_with("", {}) == affinity());
  CHECK(cpus_with("0::/\n", {{"cpu.max", "max 100000\n"}}) == affinity());
  CHECK(cpus_with("0::/\n", {{"cpu.max", "999999999 100000\n"}}) == affinity());
  CHECK(cpus_with("0::/\n", {{"cpu.max", "nonsense"}}) == affinity());
  CHECK(cpus_with("0::/\n", {{"cpu.max", "100000 0\n"}}) == affinity());
  CHECK(cpus_with("4:cpu,cpuacct:/\n", {{"cpu,cpuacct/cpu.cfs_quota_us", "-1\n"},
                                        {"cpu,cpuacct/cpu.cfs_period_us", "100000\n"}}) == affinity());
  CHECK(cpus_with("3:cpuset:/\n4:memory:/\n", {{"cpuset/cpu.max", "100000 100000\n"}}) == affinity());
}

TEST_CASE("available CPUs: a quota is rounded down, and leaves one") {
  CHECK(cpus_with("0::/\n", {{"cpu.max", "100000 100000\n"}}) == 1);
  CHECK(cpus_with("0::/\n", {{"cpu.max", "190000 100000\n"}}) == 1);
  CHECK(cpus_with("0::/\n", {{"cpu.max", "10000 100000\n"}}) == 1);
  CHECK(cpus_with("0::/\n", {{"cpu.max", "200000 100000\n"}}) == std::min(2, affinity()));
  CHECK(cpus_with("5:cpu:/\n", {{"cpu/cpu.cfs_quota_us", "50000\n"}, {"cpu/cpu.cfs_period_us", "50000\n"}}) == 1);
}

TEST_CASE("available CPUs: groups above count, and a path that only the host has does not hide the container's own") {
  const Group one = {"outer/cpu.max", "100000 100000\n"};
  CHECK(cpus_with("0::/outer/inner\n", {one, {"outer/inner/cpu.max", "max 100000\n"}}) == 1);
  CHECK(cpus_with("0::/outer/inner\n", {one}) == 1);
  CHECK(cpus_with("0::/docker/0123\n", {{"cpu.max", "100000 100000\n"}}) == 1);
  CHECK(cpus_with("0::/other\n", {one}) == affinity());
}

}  // namespace
}  // namespace meki
