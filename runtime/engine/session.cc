#include "runtime/engine/session.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/base/error.h"

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

size_t resolve_context(const BackendInfo& backend, size_t context) {
  if (context > backend.context) {
    throw std::invalid_argument("context is " + std::to_string(context) + " tokens, the " +
                                std::string(backend.context_limit) + " at most " + std::to_string(backend.context));
  }
  return context > 0 ? context : std::min(backend.context, SessionOptions::kDefaultContext);
}

size_t resolve_chunk(size_t chunk, size_t context) {
  if (chunk == 0) throw std::invalid_argument("chunk is 0 tokens, expected at least 1");
  return std::min(chunk, context);
}

Mapping make_draft_logits(const Engine& engine, const SessionOptions& options) {
  if (options.draft_tokens == 0 || options.draft_tokens > SessionOptions::kMostDraftTokens) {
    throw std::invalid_argument("draft_tokens is " + std::to_string(options.draft_tokens) + ", expected 1 to " +
                                std::to_string(SessionOptions::kMostDraftTokens));
  }
  if (!options.drafter) return {};
  return Mapping::zeroed((options.draft_tokens + 1) * engine.manifest().architecture.vocab_size * sizeof(float));
}

std::shared_ptr<const Engine> of_this_process(std::shared_ptr<const Engine> engine) {
  engine->check_process();
  return engine;
}

std::unique_ptr<Prefetcher> make_prefetcher(const Engine& engine, const Executor& executor, bool prefetch) {
  constexpr size_t kBuffers = 2;  // one is filled while the other is in use
  if (engine.rows() == nullptr) return nullptr;
  return std::make_unique<Prefetcher>(engine.rows(), executor.width(executor.chunk()), kBuffers, prefetch);
}

}  // namespace

Session::Session(std::shared_ptr<const Engine> engine, const SessionOptions& options)
    : engine_(of_this_process(std::move(engine))),
      context_(resolve_context(engine_->backend().info(), options.context)),
      executor_(engine_->backend().executor(context_, resolve_chunk(options.chunk, context_))),
      prefetcher_(make_prefetcher(*engine_, *executor_, options.prefetch)),
      drafter_(options.drafter ? options.drafter(*engine_, context_) : nullptr),
      draft_logits_(make_draft_logits(*engine_, options)),
      draft_length_(options.draft_tokens) {
  executor_->prepare(prefetcher_.get());
  tokens_.reserve(context_);
}

void Session::check_room(size_t count) const {
  if (count <= context_ - length_) return;
  const size_t limit = engine_->backend().info().context;
  throw std::invalid_argument("the sequence would have " + std::to_string(length_ + count) +
                              " tokens, the context holds " + std::to_string(context_) + "; shorten the prompt" +
                              (context_ < limit ? " or choose a larger context (up to " + std::to_string(limit) + ")"
                                                : ", the model takes no more"));
}

void Session::check_token(int64_t id) const {
  const auto limit = static_cast<int64_t>(vocab_size());
  if (id >= 0 && id < limit) return;
  throw std::invalid_argument("token id " + std::to_string(id) + " is outside the vocabulary, expected 0 to " +
                              std::to_string(limit - 1));
}

void Session::append(std::span<const int64_t> ids) {
  for (const int64_t id : ids) check_token(id);
  check_room(ids.size());
  if (ids.empty()) return;
  end_generation();
  for (const int64_t id : ids) tokens_.push_back(static_cast<int32_t>(id));
  length_ = tokens_.size();
}

void Session::end_generation() {
  drop_draft();
  rows_ = {};
  generating_ = false;
  sampler_.reset();  // its count of remaining tokens no longer holds
}

void Session::start(const SamplingOptions& sampling, size_t max_new_tokens,
                    std::optional<std::vector<int32_t>> end_token_ids) {
  if (length_ == 0) throw std::invalid_argument("the sequence is empty; give a prompt of at least one token");
  sampler_.emplace(sampling, vocab_size());
  drop_draft();  // it was cut to what the generation before had left to make
  end_token_ids_ = std::move(end_token_ids).value_or(engine_->manifest().eos_token_ids);
  const size_t room = context_ - length_;
  remaining_ = max_new_tokens > 0 ? std::min(max_new_tokens, room) : room;
  stats_.stall_ns.reserve(stats_.stall_ns.size() + remaining_);
  finish_reason_ = FinishReason::running;
  if (room == 0) {
    finish_reason_ = FinishReason::context;
  } else if (pending() == 0 && logits_.empty()) {
    executor_->state().truncate(computed() - 1);  // after a rewind: its last token is computed again for its logits
  }
}

void Session::step(const Poll& poll) {
  engine_->check_process();
  if (!sampler_) throw std::invalid_argument("no generation was started; call start first");
  if (finish_reason_ != FinishReason::running || pending() == 0) return;
  if (!generating_ || pending() > 1) {
    compute(poll);
  } else {
    const Timer timer(stats_.decode_ns);
    decode(poll);
  }
}

std::optional<int32_t> Session::next(const Poll& poll, std::optional<TokenSet> allowed) {
  step(poll);
  if (finish_reason_ != FinishReason::running) return std::nullopt;
  const bool decoding = generating_;
  uint64_t unused = 0;
  const Timer timer(decoding ? stats_.decode_ns : unused);
  const int32_t token = sample(decoding, allowed);
  if (decoding) ++stats_.decode_tokens;
  if (std::find(end_token_ids_.begin(), end_token_ids_.end(), token) != end_token_ids_.end()) {
    drop_draft();
    finish_reason_ = FinishReason::eos;
    return std::nullopt;
  }
  take(token);
  generating_ = true;
  if (--remaining_ == 0) {
    finish_reason_ = length_ == context_ ? FinishReason::context : FinishReason::length;
  } else if (pending() == 1 && (drafter_ == nullptr || drafter_->immediate())) {
    if (drafter_ != nullptr) draft(poll);
    rows_ = request_rows(computed(), 1 + drafted());
  }
  return token;
}

// Appends the sampled token, which decides about the next one of a draft that was computed.
void Session::take(int32_t token) {
  if (drafted() > 0 && tokens_[length_] == token) {
    ++length_;
    ++stats_.accepted_tokens;
    logits_ = {logits_.data() + vocab_size(), vocab_size()};
    if (drafted() == 0) draft_length_.update(draft_size_, draft_size_);
    return;
  }
  if (drafted() > 0) draft_length_.update(draft_size_, draft_size_ - drafted());
  drop_draft();
  tokens_.push_back(token);
  ++length_;
}

int32_t Session::sample(bool decoding, std::optional<TokenSet> allowed) {
  uint64_t unused = 0;
  const Timer timer(decoding ? stats_.sample_ns : unused);
  return sampler_->sample(logits_, tokens(), allowed);
}

void Session::fill_synthetic(size_t count) {
  if (pending() > 0) throw std::invalid_argument("tokens are pending; compute them before filling the cache");
  check_room(count);
  end_generation();
  executor_->state().append_noise(count);
  for (size_t i = 0; i < count; ++i) {  // a stride that visits the vocabulary far apart, as text does
    tokens_.push_back(static_cast<int32_t>((tokens_.size() * 7919) % vocab_size()));
  }
  length_ = tokens_.size();
  logits_ = {};
}

void Session::logits(size_t first, float* out, const Poll& poll) {
  if (first < computed() || first > length_) {
    throw std::invalid_argument("logits from token " + std::to_string(first) +
                                " on: expected one of the pending tokens, " + std::to_string(computed()) + " to " +
                                std::to_string(length_));
  }
  prefill(pending(), first, out, poll);
}

void Session::rewind(size_t length) {
  if (length > length_) {
    throw std::invalid_argument("cannot rewind to " + std::to_string(length) + " tokens, the sequence has " +
                                std::to_string(length_));
  }
  if (length == length_) return;
  end_generation();
  tokens_.resize(length);
  length_ = length;
  if (executor_->state().length() > length) {
    executor_->state().truncate(length);
    logits_ = {};
  }
}

Snapshot Session::snapshot(size_t length) {
  if (length > computed()) {
    throw std::invalid_argument("a snapshot of " + std::to_string(length) + " tokens: only " +
                                std::to_string(computed()) + " are computed");
  }
  if (executor_->state().length() > length_) drop_draft();
  if (!executor_->state().reaches(length)) length = 0;
  const auto its_tokens = tokens().first(length);
  return {{its_tokens.begin(), its_tokens.end()}, executor_->state().snapshot(length)};
}

size_t Session::snapshot_bytes(size_t length) const {
  if (length > context_) {
    throw std::invalid_argument("a snapshot of " + std::to_string(length) + " tokens: the context holds " +
                                std::to_string(context_));
  }
  return executor_->state().snapshot_bytes(length);
}

void Session::restore(std::span<const int32_t> tokens, std::span<const std::byte> state) {
  if (tokens.size() > context_) {
    throw std::invalid_argument("the snapshot has " + std::to_string(tokens.size()) + " tokens, the context holds " +
                                std::to_string(context_) + "; choose a larger context");
  }
  for (const int32_t id : tokens) check_token(id);
  executor_->state().restore(state, tokens.size());
  tokens_.assign(tokens.begin(), tokens.end());
  length_ = tokens_.size();
  logits_ = {};
  end_generation();
}

// Has tokens drafted behind the sequence, of which one is pending: no more than one step takes and the generation may
// still make.
void Session::draft(const Poll& poll) {
  std::array<int32_t, SessionOptions::kMostDraftTokens> ids;
  const size_t most = std::min({draft_length_.next(), remaining_ - 1, executor_->chunk() - 1});
  if (most == 0) return;
  draft_size_ = drafter_->draft(tokens(), std::span(ids).first(most), poll);
  tokens_.insert(tokens_.end(), ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(draft_size_));
}

// Forgets what is drafted and not decided, also where it was computed.
void Session::drop_draft() {
  if (drafted() == 0) return;
  rows_ = {};
  tokens_.resize(length_);
  if (executor_->state().length() > length_) executor_->state().truncate(length_);
}

// Empty in a dense model.
RowRequest Session::request_rows(size_t first, size_t count) {
  if (prefetcher_ == nullptr) return {};
  return prefetcher_->request(std::span(tokens_).first(first + count), first, executor_->width(count));
}

// Computes the pending token, and with it what is drafted.
void Session::decode(const Poll& poll) {
  if (drafter_ != nullptr && !drafter_->immediate() && drafted() == 0) draft(poll);
  uint64_t stall = 0;
  try {
    stall = decode_step();
  } catch (const PackageError&) {
    if (drafted() == 0) throw;
    draft_length_.update(draft_size_, 0);
    drop_draft();  // whose rows, perhaps, are what is damaged: without a drafter nobody would have asked for them
    stall = decode_step();
  }
  if (prefetcher_ != nullptr) stats_.stall_ns.push_back(stall);  // start() made room
}

uint64_t Session::decode_step() {
  const size_t drafts = drafted();
  float* const out = drafts > 0 ? draft_logits_.as<float>() : nullptr;
  RowRequest rows = rows_ ? std::move(rows_) : request_rows(computed(), 1 + drafts);
  const uint64_t stall = run(1 + drafts, rows, 0, out);
  if (out != nullptr) logits_ = {out, vocab_size()};
  stats_.drafted_tokens += drafts;
  return stall;
}

// Computes the first `count` pending tokens in chunks; the rows of the next chunk are read while one is computed. The
// logits of tokens[first] and all behind it go to `out`.
void Session::prefill(size_t count, size_t first, float* out, const Poll& poll) {
  engine_->check_process();
  const Timer timer(stats_.prefill_ns);
  drop_draft();
  rows_ = {};
  generating_ = false;
  const size_t end = computed() + count;
  const auto count_at = [this, end](size_t begin) { return std::min(executor_->chunk(), end - begin); };
  RowRequest rows;
  if (computed() < end) rows = request_rows(computed(), count_at(computed()));
  while (computed() < end) {
    const size_t begin = computed();
    const size_t chunk = count_at(begin);
    RowRequest next;
    if (begin + chunk < end) next = request_rows(begin + chunk, count_at(begin + chunk));
    const bool wanted = begin + chunk > first;
    const size_t logits_from = first > begin ? first - begin : 0;
    stats_.prefill_stall_ns += run(chunk, rows, logits_from, wanted ? out : nullptr);
    stats_.prefill_tokens += chunk;
    if (wanted) out += (chunk - logits_from) * vocab_size();
    rows = std::move(next);
    if (poll) poll();
  }
}

// Runs the next `tokens` tokens, whose rows were requested, through all stages. Returns the nanoseconds spent waiting
// for rows.
uint64_t Session::run(size_t tokens, RowRequest& rows, size_t logits_from, float* out) {
  logits_ = {};
  const uint64_t stall = executor_->run({.tokens = std::span(tokens_).subspan(computed(), tokens),
                                         .rows = rows ? &rows : nullptr,
                                         .logits_from = logits_from,
                                         .logits = out});
  logits_ = executor_->last_logits();
  return stall;
}

Stats Session::stats() const {
  engine_->check_process();
  Stats stats = stats_;
  if (prefetcher_ != nullptr) stats.rows = prefetcher_->counters() - rows_base_;
  return stats;
}

void Session::reset_stats() {
  engine_->check_process();
  stats_ = Stats();
  stats_.stall_ns.reserve(remaining_);
  if (prefetcher_ != nullptr) rows_base_ = prefetcher_->counters();
}

}  // namespace meki
