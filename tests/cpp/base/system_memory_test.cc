// runtime/base/system_memory, on made-up files of the system.

#include "runtime/base/system_memory.h"

#include "tests/cpp/support.h"

namespace meki {
namespace {

TEST_CASE("huge pages: given where the system's choice says so") {
  const test::TempDir directory;
  const std::filesystem::path setting = directory / "enabled";
  CHECK_FALSE(gives_huge_pages(setting));  // a system without them has no such file
  for (const auto& [text, given] : {std::pair("[always] madvise never\n", true),
                                    {"always [madvise] never\n", true},
                                    {"always madvise [never]\n", false},
                                    {"", false}}) {
    test::write_file(setting, std::string_view(text));
    CHECK_MESSAGE(gives_huge_pages(setting) == given, text);
  }
}

TEST_CASE("available memory: what the system says, or less if a control group or one above has a limit") {
  const test::TempDir directory;
  const auto available = [&] {
    return available_memory(directory / "meminfo", directory / "groups", directory / "self");
  };
  CHECK(available() == 0);
  test::write_file(directory / "meminfo",
                   std::string_view("MemTotal: 4000 kB\nMemFree: 1 kB\nMemAvailable:  3000 kB\n"));
  CHECK(available() == 3000 * 1024);
  const std::filesystem::path inner = directory / "groups" / "outer" / "inner";
  std::filesystem::create_directories(inner);
  test::write_file(directory / "self", std::string_view("0::/outer/inner\n"));
  CHECK(available() == 3000 * 1024);
  test::write_file(inner / "memory.max", std::string_view("max\n"));
  CHECK(available() == 3000 * 1024);
  test::write_file(directory / "groups" / "outer" / "memory.max", std::string_view("1048576\n"));
  CHECK(available() == 1048576);
  test::write_file(inner / "memory.max", std::string_view("524288\n"));
  CHECK(available() == 524288);

  std::filesystem::create_directories(directory / "groups" / "memory");
  test::write_file(directory / "self", std::string_view("3:memory:/host/path\n4:cpu:/outer\n"));
  test::write_file(directory / "groups" / "memory" / "memory.limit_in_bytes", std::string_view("262144\n"));
  CHECK(available() == 262144);
}

}  // namespace
}  // namespace meki
