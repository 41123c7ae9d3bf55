#include "runtime/graph/ort/resident_weights.h"

#include <algorithm>
#include <array>
#include <exception>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/base/system_memory.h"

namespace meki::ort {
namespace {

constexpr size_t kAlignment = 64;        // a cache line
constexpr size_t kPieceBytes = 4 << 20;  // of one read: little enough to keep several threads busy
constexpr size_t kSpare = 4;             // a part of so many of the available memory is left

uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Reads the file of each place into what `memory` has for it.
void read(const std::map<ResidentWeights::Place, std::byte*>& memory, const Parallel& parallel) {
  struct Piece {
    const std::filesystem::path* path;
    const File* file;
    uint64_t offset;
    std::span<std::byte> out;
  };
  std::map<std::filesystem::path, File> files;
  std::vector<Piece> pieces;
  for (const auto& [place, data] : memory) {
    const auto& [path, offset, bytes] = place;
    const File& file = files.try_emplace(path, path).first->second;
    const uint64_t end = file.size(path);
    if (bytes > end || offset > end - bytes) {
      throw PackageError(path.string() + ": " + std::to_string(end) + " bytes, the stages have a matrix of " +
                         std::to_string(bytes) + " bytes from byte " + std::to_string(offset) +
                         " on; one of them is damaged: convert the model again");
    }
    for (uint64_t first = 0; first < bytes; first += kPieceBytes) {
      pieces.push_back({&path, &file, offset + first, {data + first, std::min<uint64_t>(kPieceBytes, bytes - first)}});
    }
  }
  std::mutex mutex;
  std::exception_ptr failure;
  parallel(pieces.size(), [&](size_t index) {
    const Piece& piece = pieces[index];
    try {
      if (piece.file->read(piece.offset, piece.out, *piece.path) < piece.out.size()) {
        throw PackageError(piece.path->string() + ": it shrank while it was read; leave it alone and open it again");
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void ResidentWeights::add_to(SessionOptions* options, const ModelFile& model, const Parallel& parallel) {
  const std::lock_guard lock(mutex_);
  const auto place_of = [&model](const PackedTensor& tensor) {
    return Place{model.path.parent_path() / tensor.file, tensor.offset, tensor.bytes};
  };
  std::set<Place> missing;
  for (const PackedTensor& tensor : model.streamed) {
    if (Place place = place_of(tensor); !values_.contains(place)) missing.insert(std::move(place));
  }
  if (!load(missing, parallel)) return;
  std::set<std::string_view> names;
  for (const PackedTensor& tensor : model.streamed) {
    if (!names.insert(tensor.name).second) continue;  // the stage is damaged: ONNX Runtime says it
    library_.api.check(library_.api.AddInitializer(options, tensor.name.c_str(), values_.at(place_of(tensor)).get()));
  }
}

bool ResidentWeights::load(const std::set<Place>& places, const Parallel& parallel) {
  if (places.empty()) return true;
  if (!gives_huge_pages()) return false;
  uint64_t bytes = 0;
  const uint64_t available = available_memory();
  for (const auto& [path, offset, size] : places) {
    if (size > available) return false;  // and the sum cannot overflow
    bytes += aligned(size);
  }
  if (bytes > available - available / kSpare) return false;
  Mapping region = Mapping::zeroed(bytes);
  region.prefer_huge_pages();
  std::map<Place, std::byte*> memory;
  std::byte* next = region.data();
  for (const Place& place : places) {
    memory.emplace(place, next);
    next += aligned(std::get<2>(place));
  }
  read(memory, parallel);
  for (const auto& [place, data] : memory) {
    const auto size = std::get<2>(place);
    const std::array shape = {static_cast<int64_t>(size)};
    Value* value = nullptr;
    library_.api.check(library_.api.CreateTensorWithDataAsOrtValue(library_.cpu, data, size, shape.data(), shape.size(),
                                                                   kUint8, &value));
    values_.emplace(place, OwnedValue(value, library_.api.ReleaseValue));
  }
  regions_.push_back(std::move(region));
  return true;
}

}  // namespace meki::ort
