#include "runtime/engine/drafter.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/engine/session.h"

namespace meki {
namespace {

// Of the earlier places where the sequence's last tokens stand, the one with the most of them, of these the last one.
class PromptLookup final : public Drafter {
 public:
  bool immediate() const override { return true; }

  size_t draft(std::span<const int32_t> sequence, std::span<int32_t> draft, const Poll&) override {
    constexpr size_t kLeast = 3;    // tokens: shorter matches are everywhere, and seldom right
    constexpr size_t kEnough = 16;  // more than that say no more
    const size_t size = sequence.size();
    size_t found = 0;
    size_t longest = kLeast - 1;
    for (size_t end = size - 1; end > longest && longest < kEnough; --end) {  // backwards through all of it: no index
      if (sequence[end - 1] != sequence[size - 1]) continue;
      size_t length = 1;
      while (length < std::min(end, kEnough) && sequence[end - 1 - length] == sequence[size - 1 - length]) ++length;
      if (length <= longest) continue;
      longest = length;
      found = end;
    }
    if (found == 0) return 0;
    // Beyond the sequence's end the draft goes on with itself: what repeats with a short period does so again.
    for (size_t i = 0; i < draft.size(); ++i)
      draft[i] = found + i < size ? sequence[found + i] : draft[found + i - size];
    return draft.size();
  }
};

class DraftModel final : public Drafter {
 public:
  DraftModel(std::shared_ptr<const Engine> model, size_t context) : session_(std::move(model), {.context = context}) {}

  bool immediate() const override { return false; }

  size_t draft(std::span<const int32_t> sequence, std::span<int32_t> draft, const Poll& poll) override {
    if (sequence.size() >= session_.context()) return 0;
    const auto known = session_.tokens();
    const auto [differs, rest] = std::ranges::mismatch(known, sequence);
    session_.rewind(static_cast<size_t>(differs - known.begin()));
    session_.append(std::vector<int64_t>(rest, sequence.end()));
    session_.reset_stats();
    session_.start({.temperature = 0}, draft.size(), std::vector<int32_t>());
    size_t count = 0;
    while (const auto token = session_.next(poll)) draft[count++] = *token;
    return count;
  }

 private:
  Session session_;
};

}  // namespace

MakeDrafter prompt_lookup() {
  return [](const Engine&, size_t) { return std::make_unique<PromptLookup>(); };
}

MakeDrafter draft_model(std::shared_ptr<const Engine> model) {
  return [model = std::move(model)](const Engine& target, size_t context) {
    const uint32_t got = model->manifest().architecture.vocab_size;
    const uint32_t expected = target.manifest().architecture.vocab_size;
    if (got != expected) {
      throw std::invalid_argument("the draft model has a vocabulary of " + std::to_string(got) +
                                  " tokens, the model one of " + std::to_string(expected) +
                                  "; choose a draft model with the same tokenizer");
    }
    return std::make_unique<DraftModel>(model, std::min(context, model->backend().info().context));
  };
}

size_t DraftLength::next() {
  if (pause_ == 0) return std::min(length_, most_);
  --pause_;
  return 0;
}

void DraftLength::update(size_t drafted, size_t accepted) {
  constexpr size_t kMostFailures = 5;
  length_ = accepted == drafted ? 2 * drafted + 1 : accepted / 4 * 4 + 3;
  if (accepted > 0) {
    failures_ = 0;
  } else {
    pause_ = size_t{1} << std::min(failures_++, kMostFailures);
  }
}

}  // namespace meki
