#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace meki {

// An open file descriptor. Move-only; closes it.
class File {
 public:
  File() = default;
  // Opens read-only with extra `flags` (such as O_DIRECT). Throws PackageError with the system's reason.
  explicit File(const std::filesystem::path& path, int flags = 0);
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  // What tells one content of a file from another without reading it.
  struct State {
    uint64_t size = 0;     // bytes
    int64_t modified = 0;  // nanoseconds since the epoch
    bool operator==(const State&) const = default;
  };

  int descriptor() const { return descriptor_; }
  // As it is now. Throws PackageError unless it is a regular file.
  State state(const std::filesystem::path& path) const;
  uint64_t size(const std::filesystem::path& path) const { return state(path).size; }
  // Reads from `offset` on, until `out` is full or the file ends; returns the bytes. Throws PackageError.
  size_t read(uint64_t offset, std::span<std::byte> out, const std::filesystem::path& path) const;

 private:
  int descriptor_ = -1;
};

// A private anonymous or read-only file mapping. Move-only; unmaps it.
class Mapping {
 public:
  Mapping() = default;
  // Maps `bytes` of `file` read-only. Empty (data() == nullptr) if the file system cannot map.
  static Mapping of_file(const File& file, size_t bytes);
  // Zeroed memory, page-aligned; pages take memory when they are first written. Throws std::bad_alloc.
  static Mapping zeroed(size_t bytes);
  // Asks the system to use pages of 2 MiB, which it may do or not: for what is streamed from end to end.
  void prefer_huge_pages() const;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  Mapping(std::byte* data, size_t size) : data_(data), size_(size) {}
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The whole of a small text file. Throws PackageError if it cannot be read or is larger than `limit` bytes.
std::string read_text(const std::filesystem::path& path, size_t limit);

// Whether a package may call a file so: a name of a file in the package's own directory, that can be shown.
bool is_plain_file_name(std::string_view name);

// "why (errno text)" for messages.
std::string system_reason(int error);

}  // namespace meki
