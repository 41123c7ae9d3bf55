#pragma once

#include <algorithm>
#include <cstddef>

#include "base/file.h"

namespace meki {

// Working memory of a kernel call. Each thread has one that grows to its largest use and stays, so that the steady
// state allocates nothing. Throws std::bad_alloc when it has to grow and cannot.
class Scratch {
 public:
  // The calling thread's; valid until its next call of `begin`.
  static Scratch& begin(size_t bytes) {
    thread_local Scratch scratch;
    if (scratch.memory_.size() < bytes) scratch.memory_ = Mapping::zeroed(std::max(bytes, 2 * scratch.memory_.size()));
    scratch.used_ = 0;
    return scratch;
  }
  // Bytes that `count` objects take.
  template <class T>
  static constexpr size_t bytes(size_t count) {
    return (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }
  // Uninitialised objects out of the bytes that `begin` was asked for.
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
