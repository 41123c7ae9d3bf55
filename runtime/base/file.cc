#include "runtime/base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>
#include <utility>

#include "runtime/base/error.h"

namespace meki {

std::string system_reason(int error) { return std::generic_category().message(error); }

File::File(const std::filesystem::path& path, int flags)
    : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags)) {
  if (descriptor_ < 0) throw PackageError(path.string() + ": cannot open: " + system_reason(errno));
}

File::File(File&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

File::State File::state(const std::filesystem::path& path) const {
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0) throw PackageError(path.string() + ": cannot stat: " + system_reason(errno));
  if (!S_ISREG(status.st_mode)) throw PackageError(path.string() + ": not a regular file");
  return {static_cast<uint64_t>(status.st_size),
          status.st_mtim.tv_sec * int64_t{1'000'000'000} + status.st_mtim.tv_nsec};
}

size_t File::read(uint64_t offset, std::span<std::byte> out, const std::filesystem::path& path) const {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t got = ::pread(descriptor_, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw PackageError(path.string() + ": cannot read: " + system_reason(errno));
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

Mapping Mapping::of_file(const File& file, size_t bytes) {
  void* data = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.descriptor(), 0);
  return data == MAP_FAILED ? Mapping() : Mapping(static_cast<std::byte*>(data), bytes);
}

Mapping Mapping::zeroed(size_t bytes) {
  if (bytes == 0) return {};
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return {static_cast<std::byte*>(data), bytes};
}

void Mapping::prefer_huge_pages() const {
#ifdef MADV_HUGEPAGE
  if (data_ != nullptr) ::madvise(data_, size_, MADV_HUGEPAGE);
#endif
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         std::none_of(name.begin(), name.end(),
                      [](char c) { return c == '/' || c == '\\' || static_cast<unsigned char>(c) < 32 || c == 127; });
}

std::string read_text(const std::filesystem::path& path, size_t limit) {
  // O_NONBLOCK: a FIFO in the place of the file is refused by size(), not waited for.
  const File file(path, O_NONBLOCK);
  const uint64_t size = file.size(path);
  if (size > limit) {
    throw PackageError(path.string() + ": " + std::to_string(size) + " bytes, expected at most " +
                       std::to_string(limit));
  }
  std::string text(size, '\0');
  text.resize(file.read(0, std::as_writable_bytes(std::span(text)), path));
  return text;
}

}  // namespace meki
