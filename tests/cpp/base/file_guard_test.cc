// runtime/base/file_guard: files that shrink while they are mapped. Each case has a process of its own, as the handler
// stays, and as some end by the signal.

#include "runtime/base/file_guard.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <functional>
#include <thread>

#include "runtime/base/error.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kPages = 64;

std::vector<uint8_t> ones() { return std::vector<uint8_t>(kPages * kPage, 1); }

Mapping map(const std::filesystem::path& path) {
  return Mapping::of_file(File(path), std::filesystem::file_size(path));
}

// Sum of a byte of each page.
int sum(const Mapping& mapping) {
  int sum = 0;
  for (size_t page = 0; page < mapping.size() / kPage; ++page) {
    sum += static_cast<int>(static_cast<const volatile std::byte*>(mapping.data())[page * kPage]);
  }
  return sum;
}

template <class Work>
bool fails(Work work, std::string_view part) {
  try {
    work();
  } catch (const PackageError& error) {
    return std::string_view(error.what()).find(part) != std::string_view::npos;
  }
  return false;
}

enum End : int { kGood = 100, kBad, kBusError = 200 };

// How a child ends in which `work` says whether all is well.
int end_of(const std::function<bool()>& work) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::signal(SIGBUS, SIG_DFL);  // a sanitizer's handler would end the child in another way
    ::_exit(work() ? kGood : kBad);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGBUS ? kBusError : kBad;
  return WEXITSTATUS(status);
}

struct Fixture {
  test::TempDir directory;
  std::filesystem::path path = directory / "weights.bin";
  Fixture() { test::write_file(path, ones()); }
  void shrink(size_t bytes = 0) const { std::filesystem::resize_file(path, bytes); }
};

TEST_CASE_FIXTURE(Fixture, "file guard: without one, a page that is lost ends the process") {
  CHECK(end_of([this] {
          const Mapping mapping = map(path);
          shrink();
          return sum(mapping) == 0;
        }) == kBusError);
}

TEST_CASE_FIXTURE(Fixture, "file guard: lost pages are zeros, and an error from then on") {
  CHECK(end_of([this] {
          const FileGuard guard(path);
          const Mapping mapping = map(path);
          bool good = sum(mapping) == kPages;
          guard.check();
          shrink(10 * kPage);
          good = good && sum(mapping) == 10;
          good = good && fails([&] { guard.check(); }, "weights.bin: 40960 bytes, it had 262144");
          // The same size again, and even the same time: the pages stay lost.
          const auto modified = std::filesystem::last_write_time(path);
          test::write_file(path, ones());
          std::filesystem::last_write_time(path, modified);
          good = good && sum(mapping) == 10;
          return good && fails([&] { guard.check(); }, "weights.bin: ");
        }) == kGood);
}

TEST_CASE_FIXTURE(Fixture, "file guard: in all threads, mappings private or shared, made before or after the guard") {
  CHECK(end_of([this] {
          const Mapping before = map(path);
          const FileGuard guard(path);
          const Mapping after = map(path);
          const File file(path);
          void* data = ::mmap(nullptr, kPages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.descriptor(), 0);
          auto* const private_pages = static_cast<volatile uint8_t*>(data);
          private_pages[0] = 7;
          shrink();
          std::vector<int> sums(4, -1);
          {
            std::vector<std::jthread> threads;
            for (size_t i = 0; i < sums.size(); ++i) {
              threads.emplace_back([&, i] { sums[i] = sum(i % 2 == 0 ? before : after); });
            }
          }
          private_pages[kPage] = 9;
          const bool all_zero = std::all_of(sums.begin(), sums.end(), [](int value) { return value == 0; });
          return all_zero && private_pages[kPage] == 9 && fails([&] { guard.check(); }, "0 bytes");
        }) == kGood);
}

TEST_CASE_FIXTURE(Fixture, "file guard: threads that come upon the same loss at the same moment") {
  CHECK(end_of([this] {
          bool good = true;
          for (int round = 0; round < 50 && good; ++round) {
            test::write_file(path, ones());
            const FileGuard guard(path);
            const Mapping mapping = map(path);
            shrink();
            std::atomic<int> waiting = 4;
            std::atomic<int> total = 0;
            std::vector<std::jthread> threads;
            for (int i = 0; i < 4; ++i) {
              threads.emplace_back([&] {
                for (--waiting; waiting > 0;) {
                }
                total += sum(mapping);
              });
            }
            threads.clear();
            good = total == 0;
          }
          return good;
        }) == kGood);
}

TEST_CASE_FIXTURE(Fixture, "file guard: other files are nobody's concern, nor is this one once its guards are gone") {
  const std::filesystem::path other = directory / "other.bin";
  test::write_file(other, ones());
  CHECK(end_of([&, this] {
          const FileGuard guard(path);
          const Mapping mapping = map(other);
          std::filesystem::resize_file(other, 0);
          return sum(mapping) == 0;
        }) == kBusError);
  CHECK(end_of([this] {
          const Mapping mapping = map(path);
          static_cast<void>(FileGuard(path));
          shrink();
          return sum(mapping) == 0;
        }) == kBusError);
}

TEST_CASE_FIXTURE(Fixture, "file guard: one that is made when the file is whole again is as good as new") {
  CHECK(end_of([this] {
          const FileGuard old(path);
          const Mapping mapping = map(path);
          shrink();
          static_cast<void>(sum(mapping));
          test::write_file(path, ones());
          const FileGuard fresh(path);
          fresh.check();
          const bool good = sum(map(path)) == kPages;
          return good && fails([&] { old.check(); }, "while it was in use");
        }) == kGood);
}

TEST_CASE_FIXTURE(Fixture, "file guard: the handler of before is asked about what is not guarded") {
  CHECK(end_of([this] {
          ::signal(SIGBUS, [](int) { ::_exit(kGood); });
          const FileGuard guard(path);
          ::raise(SIGBUS);
          return false;
        }) == kGood);
  CHECK(end_of([this] {
          struct sigaction action{};
          action.sa_flags = SA_SIGINFO;
          action.sa_sigaction = [](int, siginfo_t* info, void*) { ::_exit(info->si_pid == ::getpid() ? kGood : kBad); };
          ::sigaction(SIGBUS, &action, nullptr);
          const FileGuard guard(path);
          ::raise(SIGBUS);
          return false;
        }) == kGood);
  CHECK(end_of([this] {
          ::signal(SIGBUS, SIG_IGN);
          const FileGuard guard(path);
          ::raise(SIGBUS);
          return true;
        }) == kGood);
  CHECK(end_of([this] {
          const FileGuard guard(path);
          ::raise(SIGBUS);
          return true;
        }) == kBusError);
}

TEST_CASE_FIXTURE(Fixture, "file guard: what is written in place is noticed by its time") {
  const FileGuard guard(path);
  guard.check();
  std::filesystem::last_write_time(path, std::filesystem::last_write_time(path) + std::chrono::seconds(1));
  test::check_names(test::error_of<PackageError>([&] { guard.check(); }), "weights.bin: it was written to");
}

TEST_CASE_FIXTURE(Fixture, "file guard: empty, missing and special files") {
  shrink();
  FileGuard(path).check();
  test::check_names(test::error_of<PackageError>([&] { FileGuard(directory / "none"); }), "cannot open");
  test::check_names(test::error_of<PackageError>([&] { FileGuard(directory.path()); }), "not a regular file");
}

}  // namespace
}  // namespace meki
