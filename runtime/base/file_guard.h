#pragma once

#include <filesystem>

#include "runtime/base/file.h"

namespace meki {

// Keeps the process alive when a file that is mapped, by whomever, loses what was mapped: it shrinks, or its storage
// fails. To touch such a page is SIGBUS, which ends a process. While a guard of the file lives, a handler puts zeros in
// the place of the lost pages, so that whoever reads them goes on, and check() says that what was read is worth
// nothing.
//
// The handler is installed with the first guard and stays. It finds the file by what /proc/self/maps says of the
// address; for all other files it does what was to be done before it came: the handler of then, or death. A handler
// that is installed later, and does not call the one that it found, ends the protection.
//
// What a guard does not see: bytes that are overwritten where they are by a program that also puts the file's time of
// modification back, or through a mapping whose changes have not been written to storage yet.
//
// Neither copyable nor movable. Thread-safe.
class FileGuard {
 public:
  // Of the file as it is now. Throws PackageError if it cannot be opened or is not a regular file.
  explicit FileGuard(std::filesystem::path path);
  ~FileGuard();
  FileGuard(const FileGuard&) = delete;
  FileGuard& operator=(const FileGuard&) = delete;

  // Throws PackageError if, since the guard was made, a page of the file was lost, or the file has another size or time
  // of modification; once a page was lost, for good. Costs one fstat.
  void check() const;

 private:
  struct Watch;  // what the handler knows
  friend struct FileGuardHandler;

  const std::filesystem::path path_;
  const File file_;
  const File::State state_;
  Watch* watch_ = nullptr;
};

}  // namespace meki
