// runtime/rows/readers: every piece is done once, by whoever is there.

#include "runtime/rows/readers.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/cpp/support.h"

namespace meki {
namespace {

TEST_CASE("readers: each piece is done once before run() returns, by readers with numbers below count()") {
  for (const size_t count : {1, 2, 5}) {
    Readers readers(count);
    CHECK(readers.count() == count);
    for (const size_t pieces : {0, 1, 2, 3, 100}) {
      for (int round = 0; round < 50; ++round) {
        std::vector<std::atomic<int>> done(pieces);
        std::atomic<size_t> highest = 0;
        readers.run(pieces, [&](size_t piece, size_t reader) {
          ++done[piece];
          if (reader > highest) highest = reader;
        });
        CHECK(highest < count);
        for (const std::atomic<int>& times : done) CHECK(times == 1);
      }
    }
  }
}

TEST_CASE("readers: no two pieces of one reader overlap") {
  Readers readers(4);
  std::vector<std::atomic<int>> inside(4);
  std::atomic<bool> overlapped = false;
  readers.run(300, [&](size_t, size_t reader) {
    if (++inside[reader] > 1) overlapped = true;
    std::this_thread::yield();
    --inside[reader];
  });
  CHECK(!overlapped);
}

TEST_CASE("readers: what a piece throws comes out of run(), once, and the next run is as the first") {
  Readers readers(3);
  for (int round = 0; round < 50; ++round) {
    CAPTURE(round);
    std::string caught;
    try {
      readers.run(20, [&](size_t piece, size_t) {
        if (piece % 7 == 3) throw std::runtime_error("piece " + std::to_string(piece));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught.starts_with("piece "));
    std::atomic<int> done = 0;
    readers.run(20, [&](size_t, size_t) { ++done; });
    CHECK(done == 20);
  }
}

TEST_CASE("readers: a second caller does its work meanwhile, alone") {
  Readers readers(3);
  std::atomic<int> held = 0;
  std::atomic<bool> released = false;
  std::thread first([&] {
    readers.run(3, [&](size_t, size_t) {
      ++held;
      while (!released) std::this_thread::yield();
    });
  });
  while (held < 3) std::this_thread::yield();
  int done = 0;
  bool alone = true;
  readers.run(10, [&](size_t, size_t reader) {
    ++done;
    alone = alone && reader == 0;
  });
  CHECK(done == 10);
  CHECK(alone);
  released = true;
  first.join();
}

}  // namespace
}  // namespace meki
