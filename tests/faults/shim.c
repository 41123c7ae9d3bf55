// Preloaded into a process (LD_PRELOAD): makes reads of one file, and allocations, fail in the ways that storage and
// systems do. Armed and disarmed by the process itself, through fault_arm and fault_disarm.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum Kind {
  kNone,
  kIoError,      // EIO
  kInterrupted,  // EINTR
  kAgain,        // EAGAIN
  kShort,        // half of the bytes
  kNothing,      // no byte, as at the end of a file
  kGarbage,      // all bytes, each flipped
  kOtherFile,    // all bytes, of another file
  kStall,        // all bytes, late
  kNoMemory,     // anonymous mappings
};

static _Atomic int kind = kNone;
static _Atomic long skip;   // calls that succeed before the first that fails
static _Atomic long count;  // calls that fail
static _Atomic long failed;
static ino_t inode;  // whose reads fail

void fault_arm(int new_kind, ino_t file, long after, long times) {
  inode = file;
  skip = after;
  count = times;
  failed = 0;
  kind = new_kind;
}

// How many calls failed.
long fault_disarm(void) {
  kind = kNone;
  return failed;
}

static int strikes(int wanted) {
  if (kind == kNone || (kind == kNoMemory) != (wanted == kNoMemory)) return kNone;
  if (atomic_fetch_sub(&skip, 1) > 0 || atomic_fetch_sub(&count, 1) <= 0) return kNone;
  ++failed;
  return kind;
}

static int is_target(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 && status.st_ino == inode;
}

// What a read becomes that has put `got` bytes into `data`.
static ssize_t spoil(int how, char* data, ssize_t got) {
  switch (how) {
    case kIoError: errno = EIO; return -1;
    case kInterrupted: errno = EINTR; return -1;
    case kAgain: errno = EAGAIN; return -1;
    case kShort: return got > 1 ? got / 2 : got;
    case kNothing: return 0;
    case kGarbage:
      for (ssize_t i = 0; i < got; ++i) data[i] = (char)~data[i];
      return got;
    case kOtherFile:
      if (got > 0) memset(data, 0, (size_t)got);  // as of /dev/zero
      return got;
    case kStall: usleep(5 * 1000); return got;
    default: return got;
  }
}

typedef ssize_t (*Pread)(int, void*, size_t, off_t);
typedef ssize_t (*Readv)(pid_t, const struct iovec*, unsigned long, const struct iovec*, unsigned long, unsigned long);
typedef void* (*Mmap)(void*, size_t, int, int, int, off_t);

static ssize_t read_with(Pread real, int descriptor, void* data, size_t bytes, off_t offset) {
  const ssize_t got = real(descriptor, data, bytes, offset);
  const int how = kind != kNone && is_target(descriptor) ? strikes(kNone) : kNone;
  return how != kNone ? spoil(how, data, got) : got;
}

ssize_t pread(int descriptor, void* data, size_t bytes, off_t offset) {
  return read_with((Pread)dlsym(RTLD_NEXT, "pread"), descriptor, data, bytes, offset);
}

ssize_t pread64(int descriptor, void* data, size_t bytes, off_t offset) {
  return read_with((Pread)dlsym(RTLD_NEXT, "pread64"), descriptor, data, bytes, offset);
}

ssize_t process_vm_readv(pid_t process, const struct iovec* to, unsigned long to_count, const struct iovec* from,
                         unsigned long from_count, unsigned long flags) {
  const Readv real = (Readv)dlsym(RTLD_NEXT, "process_vm_readv");
  const ssize_t got = real(process, to, to_count, from, from_count, flags);
  const int how = kind != kNone && process == getpid() ? strikes(kNone) : kNone;  // so nothing but a ROM is read
  return how != kNone ? spoil(how, to->iov_base, got) : got;
}

static void* map_with(Mmap real, void* address, size_t bytes, int protection, int flags, int descriptor, off_t offset) {
  if ((flags & MAP_ANONYMOUS) != 0 && kind == kNoMemory && strikes(kNoMemory) != kNone) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return real(address, bytes, protection, flags, descriptor, offset);
}

void* mmap(void* address, size_t bytes, int protection, int flags, int descriptor, off_t offset) {
  return map_with((Mmap)dlsym(RTLD_NEXT, "mmap"), address, bytes, protection, flags, descriptor, offset);
}

void* mmap64(void* address, size_t bytes, int protection, int flags, int descriptor, off_t offset) {
  return map_with((Mmap)dlsym(RTLD_NEXT, "mmap64"), address, bytes, protection, flags, descriptor, offset);
}
