#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/base/file.h"
#include "runtime/rows/row_decorator.h"

namespace meki {

// A source whose parts, once fetched and checked, are kept in memory as they are stored: a text is mostly made of few
// tokens. Nothing is allocated after the construction, and memory is taken only as parts come.
//
// A part belongs to a set, by a hash of its index. A set is a list: a part that is used goes to the front, a new one in
// at three quarters, and the last one makes room. So what is used once, such as the rare tokens of a long prompt, comes
// and goes in the last quarter. docs/architecture.md has how that compares.
class RowCache final : public RowDecorator {
 public:
  // Parts, and what it takes to find them, come to `bytes` at most, in which at least one part has room. Throws
  // std::runtime_error if the system does not give as much.
  RowCache(std::shared_ptr<const RowSource> source, size_t bytes);

  // Does nothing for a part that is here.
  void advise(uint64_t index) const noexcept override;
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override;
  void drop_cache() const noexcept override;

  // Parts of the source that `bytes` have room for.
  static size_t room(const RowSource& source, size_t bytes);

 private:
  struct Entry {
    uint64_t index;  // of the part
    uint32_t slot;   // of the set's: where the part is
  };
  struct Set {
    Entry* entries;    // [ways], the front first
    uint32_t& used;    // of the entries
    std::byte* slots;  // [ways, part_bytes()]
  };
  Set set_of(uint64_t index) const;
  static Entry* find(const Set& set, uint64_t index);
  std::byte* slot(const Set& set, const Entry& entry) const;
  void insert(const Set& set, uint64_t index, std::span<const std::byte> stored) const;

  const size_t sets_;
  const size_t ways_;  // parts of a set
  // The mutex guards what is below.
  mutable std::mutex mutex_;
  const Mapping entries_;               // Entry [sets, ways]
  const Mapping slots_;                 // [sets, ways, part_bytes()]
  mutable std::vector<uint32_t> used_;  // [sets]
};

// `source` behind a cache of up to `bytes`; `source` itself where not one part has room.
std::shared_ptr<const RowSource> with_row_cache(std::shared_ptr<const RowSource> source, size_t bytes);

}  // namespace meki
