#pragma once

#include <cstddef>

namespace meki {

// Runs pieces of work on the threads of whoever provides it. A thread takes neighbouring pieces one after the other as
// long as there are some, and a thread that is done takes over pieces of the others, so that a slow or busy core does
// fewer of them. A view: copy it freely, within the life of what `context` points to.
struct Parallel {
  size_t threads = 1;
  void* context = nullptr;
  // Calls piece(data, i) once for every i below `pieces`, on any threads, and returns when all have ended. Null: here.
  void (*run)(void* context, size_t pieces, void (*piece)(void* data, size_t index), void* data) = nullptr;

  // The same for a callable; it must not throw.
  template <class Piece>
  void operator()(size_t pieces, const Piece& piece) const {
    if (pieces <= 1 || threads == 1 || run == nullptr) {
      for (size_t index = 0; index < pieces; ++index) piece(index);
      return;
    }
    run(
        context, pieces, [](void* data, size_t index) { (*static_cast<const Piece*>(data))(index); },
        const_cast<Piece*>(&piece));
  }
};

}  // namespace meki
