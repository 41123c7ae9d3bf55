#include "runtime/measure/rows_in_ram.h"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/base/file.h"
#include "runtime/rows/row_decorator.h"
#include "runtime/rows/token_table.h"

namespace meki::bench {
namespace {

Mapping allocate(uint64_t bytes) {
  try {
    return Mapping::zeroed(bytes);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("the rows need " + std::to_string(bytes >> 20) +
                             " MiB, which the system does not give; measure a smaller model");
  }
}

// Another source, all of whose parts are here.
class RowsInRam final : public RowDecorator {
 public:
  // table: the file that `source` reads, whose bundles are its parts.
  RowsInRam(std::shared_ptr<const RowSource> source, const TokenTable& table, const Session::Poll& poll)
      : RowDecorator(std::move(source)), parts_(allocate(table.header().entries * part_bytes())) {
    parts_.prefer_huge_pages();  // memory at its best
    const Mapping scratch = Mapping::zeroed(table.scratch_bytes());
    for (uint64_t index = 0; index < table.header().entries; ++index) {
      poll();
      const FetchedPart part = table.fetch(index, {scratch.data(), scratch.size()});
      std::memcpy(parts_.data() + index * part_bytes(), part.stored.data(), part_bytes());
    }
  }

  void advise(uint64_t /*index*/) const noexcept override {}
  bool waits() const override { return false; }
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override {
    const std::span<std::byte> copy = scratch.first(part_bytes());
    std::memcpy(copy.data(), parts_.data() + index * part_bytes(), copy.size());
    return {copy, 0};
  }
  void drop_cache() const noexcept override {}
  std::string_view access() const override { return "ram"; }

 private:
  const Mapping parts_;  // [entries, part_bytes()]
};

}  // namespace

std::shared_ptr<const Engine> with_rows_in_ram(const std::shared_ptr<const Engine>& engine, const Session::Poll& poll) {
  const Manifest& manifest = engine->manifest();
  if (!manifest.memory) throw std::invalid_argument("the model runs without a memory and so without rows");
  const TokenTable table(manifest.directory / manifest.memory->file, RomAccess::pread);
  auto rows = std::make_shared<const RowsInRam>(engine->rows(), table, poll);
  const std::shared_ptr<const Backend> backend(engine, &engine->backend());  // which lives as long as its engine
  return std::make_shared<const Engine>(std::move(rows), backend, engine->threads());
}

}  // namespace meki::bench
