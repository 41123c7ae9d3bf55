#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace meki {

// float32 [layers, row_dim].
struct RowShape {
  uint32_t layers = 0;
  uint32_t row_dim = 0;
};

// A part of one token's rows: what a source reads for it, and where in the rows it goes.
struct RowKey {
  uint64_t index = 0;  // the source's own number of the part; parts of one index have the same content
  uint32_t layer = 0;  // of the part's first value
  uint32_t column = 0;
};

// A part as it is stored, checked. Passive data.
struct FetchedPart {
  std::span<const std::byte> stored;  // RowSource::part_bytes()
  size_t bytes = 0;                   // asked of the system for it; 0: it was in memory
};

// What gives the memory rows of tokens. A token's rows are the parts that its keys name: one for a table with an entry
// a token, many for hashed n-grams. Immutable and thread-safe.
class RowSource {
 public:
  RowSource() = default;
  RowSource(const RowSource&) = delete;
  RowSource& operator=(const RowSource&) = delete;
  virtual ~RowSource() = default;

  // Of all rows of one token.
  virtual RowShape shape() const = 0;
  // Of what one key fills. The parts of a token's keys cover shape() without overlapping.
  virtual RowShape part() const = 0;
  virtual size_t keys_per_token() const = 0;
  // Earlier tokens that decide a token's rows: 0 if the token alone does, n - 1 for n-grams.
  virtual size_t history() const = 0;
  // Writes the keys_per_token() keys of the last token of `sequence`, a whole sequence up to that token or at least its
  // last history() + 1 tokens. Their ids are below the model's vocabulary size.
  virtual void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const = 0;

  // Of one part as it is stored.
  virtual size_t part_bytes() const = 0;
  // What fetch() needs: this many bytes, at least part_bytes(), aligned to kScratchAlignment.
  virtual size_t scratch_bytes() const = 0;
  static constexpr size_t kScratchAlignment = 4096;
  // Asks the system to have the part of a key's index at hand soon; does not wait.
  virtual void advise(uint64_t index) const noexcept = 0;
  // Whether fetch() waits for storage whatever was advised: then several parts take less time side by side.
  virtual bool waits() const { return false; }
  // Brings the part of a key's index into `scratch`, where the result lies, and checks it. Blocks on storage. Throws
  // PackageError.
  virtual FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const = 0;
  // Widens what fetch() gave: row l goes to out[l * layer_stride .. + row_dim) of part().
  virtual void widen(std::span<const std::byte> stored, float* out, size_t layer_stride) const noexcept = 0;
  // Both. Returns the bytes that were asked of the system. Throws as fetch(), then `out` is as it was.
  size_t read(uint64_t index, std::span<std::byte> scratch, float* out, size_t layer_stride) const {
    const FetchedPart part = fetch(index, scratch);
    widen(part.stored, out, layer_stride);
    return part.bytes;
  }

  // Forgets what it has in memory and asks the system to do so, too, so that the next reads go to storage. Best effort.
  virtual void drop_cache() const noexcept = 0;
  // How it reads, for people and statistics; "pread" for example.
  virtual std::string_view access() const = 0;
};

}  // namespace meki
