#include "runtime/base/file_guard.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "runtime/base/error.h"

namespace meki {
namespace {

// A line of /proc/self/maps, read character by character: "begin-end rwxp offset major:minor inode   path".
class MapsLine {
 public:
  // True at its end.
  bool push(char c) {
    if (c == '\n') return true;
    if (field_ == kPath) return false;
    if (c == ' ' || c == ':' || (c == '-' && field_ == kBegin)) {
      ++field_;
    } else if (field_ == kMode) {
      fields_[kMode] |= static_cast<uint64_t>(c == 'w');
    } else {
      const auto digit = static_cast<uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10);
      fields_[field_] = fields_[field_] * (field_ == kInode ? 10 : 16) + digit;
    }
    return false;
  }

  bool has(uintptr_t address) const { return address >= fields_[kBegin] && address < fields_[kEnd]; }
  uintptr_t end() const { return fields_[kEnd]; }
  bool writable() const { return fields_[kMode] != 0; }
  // Of the file. What stat() says is another number on some file systems.
  uint64_t device() const { return fields_[kMajor] << 32 | fields_[kMinor]; }
  uint64_t inode() const { return fields_[kInode]; }

 private:
  enum : size_t { kBegin, kEnd, kMode, kOffset, kMajor, kMinor, kInode, kPath };
  std::array<uint64_t, kPath> fields_{};
  size_t field_ = kBegin;
};

// What is mapped at an address. Does no more than a signal handler may.
std::optional<MapsLine> mapped_at(uintptr_t address) {
  const int maps = ::open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return std::nullopt;
  std::optional<MapsLine> found;
  MapsLine line;
  std::array<char, 1024> bytes;
  for (ssize_t got = 0; !found && (got = ::read(maps, bytes.data(), bytes.size())) > 0;) {
    for (size_t i = 0; i < static_cast<size_t>(got) && !found; ++i) {
      if (!line.push(bytes[i])) continue;
      if (line.has(address)) found = line;
      line = {};
    }
  }
  ::close(maps);
  return found;
}

uintptr_t page_of(const void* address) {
  const auto bytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  return reinterpret_cast<uintptr_t>(address) / bytes * bytes;
}

}  // namespace

// Never freed, but used again: a handler may look at one at any time.
struct FileGuard::Watch {
  std::atomic<uint64_t> device = 0;
  std::atomic<uint64_t> inode = 0;  // 0: not in use
  std::atomic<bool> lost = false;
  Watch* next = nullptr;
};

struct FileGuardHandler {
  using Watch = FileGuard::Watch;

  static inline std::atomic<Watch*> watches = nullptr;
  static inline struct sigaction before{};  // what was to be done before

  // A file's watch; installs the handler before the first.
  static Watch* watch(const MapsLine& file) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    if (watches == nullptr) install();
    Watch* watch = watches;
    while (watch != nullptr && watch->inode != 0) watch = watch->next;
    if (watch == nullptr) {
      watch = new Watch;
      watch->next = watches;
      watches = watch;
    }
    watch->lost = false;
    watch->device = file.device();
    watch->inode = file.inode();
    return watch;
  }

  static void install() {
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    ::sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &before);
  }

  static void handle(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    const bool is_fault = info->si_code > 0;  // not sent by a process
    const bool rescued = is_fault && rescue(info->si_addr, info->si_code);
    errno = saved;
    if (rescued) return;
    if ((before.sa_flags & SA_SIGINFO) != 0) {
      before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler == SIG_DFL || (before.sa_handler == SIG_IGN && is_fault)) {
      ::signal(signal, SIG_DFL);
      ::raise(signal);  // once this handler returns
    } else if (before.sa_handler != SIG_IGN) {
      before.sa_handler(signal);
    }
  }

  // Zeros from the page of `address` to the end of what is mapped there, if that is a watched file.
  static bool rescue(const void* address, int code) {
    const uintptr_t page = page_of(address);
    const std::optional<MapsLine> mapped = mapped_at(page);
    if (!mapped) return false;
    // Not a file's: another thread that came upon the same loss has been here.
    if (mapped->inode() == 0) return code == BUS_ADRERR;
    bool watched = false;
    for (Watch* watch = watches; watch != nullptr; watch = watch->next) {
      if (watch->inode != mapped->inode() || watch->device != mapped->device()) continue;
      watch->lost = true;
      watched = true;
    }
    const int protection = mapped->writable() ? PROT_READ | PROT_WRITE : PROT_READ;
    constexpr int kFlags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return watched &&
           ::mmap(reinterpret_cast<void*>(page), mapped->end() - page, protection, kFlags, -1, 0) != MAP_FAILED;
  }
};

FileGuard::FileGuard(std::filesystem::path path)
    : path_(std::move(path)), file_(path_, O_NONBLOCK), state_(file_.state(path_)) {
  // A page mapped here tells by which numbers /proc/self/maps knows the file. One that cannot be mapped, nobody maps.
  const Mapping probe = state_.size > 0 ? Mapping::of_file(file_, 1) : Mapping();
  if (probe.data() == nullptr) return;
  if (const auto mapped = mapped_at(page_of(probe.data()))) watch_ = FileGuardHandler::watch(*mapped);
}

FileGuard::~FileGuard() {
  if (watch_ != nullptr) watch_->inode = 0;
}

void FileGuard::check() const {
  const File::State now = file_.state(path_);
  const bool lost = watch_ != nullptr && watch_->lost;
  if (!lost && now == state_) return;
  throw PackageError(path_.string() + ": " +
                     (now.size != state_.size
                          ? std::to_string(now.size) + " bytes, it had " + std::to_string(state_.size)
                      : lost ? "a part of it could not be read"
                             : "it was written to") +
                     " while it was in use; restore the file and open the model again");
}

}  // namespace meki
