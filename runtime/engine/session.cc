#include "runtime/engine/session.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

namespace meki {
namespace {

// Adds the time of its life to `total`, in nanoseconds.
class Timer {
 public:
  explicit Timer(uint64_t& total) : total_(total), start_(std::chrono::steady_clock::now()) {}
  ~Timer() {
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    total_ += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  uint64_t& total_;
  std::chrono::steady_clock::time_point start_;
};

size_t resolve_context(const Engine& engine, size_t context) {
  const size_t limit = engine.context();
  if (context > limit) {
    const char* what = engine.provider() == Provider::qnn ? " tokens, the model is compiled for at most "
                                                          : " tokens, the model supports at most ";
    throw std::invalid_argument("context is " + std::to_string(context) + what + std::to_string(limit));
  }
  return context > 0 ? context : std::min(limit, SessionOptions::kDefaultContext);
}

size_t resolve_chunk(const Engine& engine, size_t chunk, size_t context) {
  if (chunk == 0) throw std::invalid_argument("chunk is 0 tokens, expected at least 1");
  if (engine.static_model() != nullptr) chunk = std::min(chunk, engine.static_model()->chunk);
  return std::min(chunk, context);
}

}  // namespace

Session::Session(std::shared_ptr<const Engine> engine, const SessionOptions& options)
    : engine_(std::move(engine)),
      context_(resolve_context(*engine_, options.context)),
      chunk_(resolve_chunk(*engine_, options.chunk, context_)),
      steps_(make_steps(*engine_, context_, chunk_, options.prefetch)) {
  tokens_.reserve(context_);
}

void Session::check_room(size_t count) const {
  if (count <= context_ - tokens_.size()) return;
  throw std::invalid_argument("the sequence would have " + std::to_string(tokens_.size() + count) +
                              " tokens, the context holds " + std::to_string(context_) +
                              "; shorten the prompt or choose a larger context (up to " +
                              std::to_string(engine_->context()) + " here)");
}

void Session::prompt(std::span<const int64_t> ids) {
  const auto limit = static_cast<int64_t>(vocab_size());
  for (const int64_t id : ids) {
    if (id < 0 || id >= limit) {
      throw std::invalid_argument("token id " + std::to_string(id) + " is outside the vocabulary, expected 0 to " +
                                  std::to_string(limit - 1));
    }
  }
  check_room(ids.size());
  for (const int64_t id : ids) tokens_.push_back(static_cast<int32_t>(id));
  if (ids.empty()) return;
  rows_begun_ = generating_ = false;
  sampler_.reset();  // its count of remaining tokens no longer holds
}

void Session::start(const SamplingOptions& sampling, size_t max_new_tokens) {
  if (tokens_.empty()) throw std::invalid_argument("the sequence is empty; give a prompt of at least one token");
  sampler_.emplace(sampling, vocab_size());
  const size_t room = context_ - tokens_.size();
  remaining_ = max_new_tokens > 0 ? std::min(max_new_tokens, room) : room;
  stats_.stall_ns.reserve(stats_.stall_ns.size() + remaining_);
  finish_reason_ = FinishReason::running;
  if (room == 0) {
    finish_reason_ = FinishReason::context;
  } else if (pending() == 0 && !logits_valid_) {
    --computed_;  // after a rewind: the last token is computed again for its logits
  }
}

std::optional<int32_t> Session::next(const Poll& poll) {
  if (!sampler_) throw std::invalid_argument("no generation was started; call start first");
  if (finish_reason_ != FinishReason::running) return std::nullopt;
  const bool decoding = generating_ && pending() == 1;
  if (!decoding && pending() > 0) prefill(nullptr, poll);

  uint64_t unused = 0;
  const Timer timer(decoding ? stats_.decode_ns : unused);
  if (decoding) decode();
  const int32_t token = sample(decoding);
  const auto& eos = engine_->manifest().eos_token_ids;
  if (std::find(eos.begin(), eos.end(), token) != eos.end()) {
    finish_reason_ = FinishReason::eos;
    return std::nullopt;
  }
  tokens_.push_back(token);
  generating_ = true;
  if (--remaining_ == 0) {
    finish_reason_ = tokens_.size() == context_ ? FinishReason::context : FinishReason::length;
  } else {
    request_rows(0, computed_, 1);
    rows_begun_ = true;
  }
  return token;
}

int32_t Session::sample(bool decoding) {
  uint64_t unused = 0;
  const Timer timer(decoding ? stats_.sample_ns : unused);
  return sampler_->sample(steps_->last_logits(), tokens_);
}

void Session::fill_synthetic(size_t count) {
  if (pending() > 0) throw std::invalid_argument("tokens are pending; compute them before filling the cache");
  check_room(count);
  steps_->fill_cache(tokens_.size(), tokens_.size() + count);
  for (size_t i = 0; i < count; ++i) {  // a stride that visits the vocabulary far apart, as text does
    tokens_.push_back(static_cast<int32_t>((tokens_.size() * 7919) % vocab_size()));
  }
  computed_ = tokens_.size();
  logits_valid_ = rows_begun_ = generating_ = false;
  sampler_.reset();
}

void Session::logits(float* out, const Poll& poll) { prefill(out, poll); }

void Session::rewind(size_t length) {
  if (length > tokens_.size()) {
    throw std::invalid_argument("cannot rewind to " + std::to_string(length) + " tokens, the sequence has " +
                                std::to_string(tokens_.size()));
  }
  if (length == tokens_.size()) return;
  tokens_.resize(length);
  logits_valid_ = logits_valid_ && computed_ <= length;
  computed_ = std::min(computed_, length);
  rows_begun_ = generating_ = false;
  sampler_.reset();
}

void Session::request_rows(int slot, size_t first, size_t count) {
  steps_->request(slot, std::span(tokens_).first(first + count), first);
}

void Session::decode() {
  if (!rows_begun_) request_rows(0, computed_, 1);
  rows_begun_ = false;
  const uint64_t stall = run(1, 0, nullptr);
  ++stats_.decode_tokens;
  if (steps_->has_rows()) stats_.stall_ns.push_back(stall);  // start() made room
}

// Computes all pending tokens in chunks; the rows of the next chunk are read while one is computed.
void Session::prefill(float* all_logits, const Poll& poll) {
  const Timer timer(stats_.prefill_ns);
  rows_begun_ = generating_ = false;
  const size_t end = tokens_.size();
  const auto count_at = [this, end](size_t first) { return std::min(chunk_, end - first); };
  int slot = 0;
  if (computed_ < end) request_rows(slot, computed_, count_at(computed_));
  while (computed_ < end) {
    const size_t count = count_at(computed_);
    if (computed_ + count < end) request_rows(1 - slot, computed_ + count, count_at(computed_ + count));
    stats_.prefill_stall_ns += run(count, slot, all_logits);
    stats_.prefill_tokens += count;
    if (all_logits != nullptr) all_logits += count * vocab_size();
    slot = 1 - slot;
    if (poll) poll();
  }
}

// Runs the next `tokens` tokens through all stages; the rows come from `slot`, into which they were requested. Returns
// the nanoseconds spent waiting for rows.
uint64_t Session::run(size_t tokens, int slot, float* all_logits) {
  logits_valid_ = false;
  const uint64_t stall = steps_->run({std::span(tokens_).subspan(computed_, tokens), computed_, slot, all_logits});
  computed_ += tokens;
  logits_valid_ = true;
  return stall;
}

Stats Session::stats() const {
  Stats stats = stats_;
  const RowCounters now = steps_->row_counters();
  stats.rom = {now.requests - rom_base_.requests, now.bytes - rom_base_.bytes};
  return stats;
}

void Session::reset_stats() {
  stats_ = Stats();
  stats_.stall_ns.reserve(remaining_);
  rom_base_ = steps_->row_counters();
}

}  // namespace meki
