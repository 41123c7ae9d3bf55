#pragma once

#include <memory>
#include <utility>

#include "runtime/rows/row_source.h"

namespace meki {

// Another source, unchanged: the base of sources that change one thing about it.
class RowDecorator : public RowSource {
 public:
  RowShape shape() const override { return source_->shape(); }
  RowShape part() const override { return source_->part(); }
  size_t keys_per_token() const override { return source_->keys_per_token(); }
  size_t history() const override { return source_->history(); }
  void keys(std::span<const int32_t> sequence, std::span<RowKey> out) const override { source_->keys(sequence, out); }
  size_t part_bytes() const override { return source_->part_bytes(); }
  size_t scratch_bytes() const override { return source_->scratch_bytes(); }
  void advise(uint64_t index) const noexcept override { source_->advise(index); }
  bool waits() const override { return source_->waits(); }
  FetchedPart fetch(uint64_t index, std::span<std::byte> scratch) const override {
    return source_->fetch(index, scratch);
  }
  void widen(std::span<const std::byte> stored, float* out, size_t layer_stride) const noexcept override {
    source_->widen(stored, out, layer_stride);
  }
  void drop_cache() const noexcept override { source_->drop_cache(); }
  std::string_view access() const override { return source_->access(); }

 protected:
  explicit RowDecorator(std::shared_ptr<const RowSource> source) : source_(std::move(source)) {}

 private:
  const std::shared_ptr<const RowSource> source_;
};

}  // namespace meki
