#pragma once

#include <algorithm>
#include <cstddef>

#include "runtime/base/file.h"

namespace meki {

// Working memory of a kernel, kept from call to call (each kernel has one a thread): it grows to its largest use and
// stays, so that the steady state allocates nothing.
class Scratch {
 public:
  // Bytes that `count` objects take.
  template <class T>
  static constexpr size_t bytes(size_t count) {
    return (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }
  // Begins a call that takes `bytes` in all; what was taken before is invalid. Throws std::bad_alloc.
  void begin(size_t bytes) {
    if (memory_.size() < bytes) memory_ = Mapping::zeroed(std::max(bytes, 2 * memory_.size()));
    used_ = 0;
  }
  // Uninitialised objects, aligned to a cache line.
  template <class T>
  T* take(size_t count) {
    T* const taken = reinterpret_cast<T*>(memory_.data() + used_);
    used_ += bytes<T>(count);
    return taken;
  }

 private:
  static constexpr size_t kAlignment = 64;
  Mapping memory_;
  size_t used_ = 0;
};

}  // namespace meki
