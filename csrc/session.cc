// Sessions in Python, with what they are made of and give.

#include "runtime/engine/session.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/bindings.h"
#include "runtime/engine/drafter.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/sampler.h"

namespace py = pybind11;
using namespace py::literals;

namespace meki {
namespace {

// Makes a second thread that enters a session an error instead of a data race.
class GuardedSession {
 public:
  GuardedSession(std::shared_ptr<const Engine> engine, const SessionOptions& options)
      : vocab_size_(engine->manifest().architecture.vocab_size), session_(std::move(engine), options) {}

  // Runs `work(session, arguments...)`, `work` being a member function of Session perhaps, without the GIL.
  template <class Work, class... Arguments>
  auto call(Work work, Arguments&&... arguments) {
    const py::gil_scoped_release release;
    const auto lock = enter();
    return std::invoke(work, session_, std::forward<Arguments>(arguments)...);
  }
  std::optional<int32_t> next(const std::optional<py::bytes>& allowed) {
    std::optional<TokenSet> set;
    std::vector<uint32_t> words;  // of the bytes, which may lie anywhere
    if (allowed) {
      const std::string_view bytes(*allowed);
      words.resize(bytes.size() / sizeof(uint32_t));
      std::memcpy(words.data(), bytes.data(), words.size() * sizeof(uint32_t));
      set = words;
    }
    return call(&Session::next, poll_signals, set);
  }
  size_t compute(size_t most) {
    return call([most](Session& session) {
      session.compute(most, poll_signals);
      return session.pending();
    });
  }
  // Session::step_together.
  static void step_together(const std::vector<GuardedSession*>& guarded) {
    const py::gil_scoped_release release;
    std::vector<GuardedSession*> sorted = guarded;
    std::sort(sorted.begin(), sorted.end());
    if (!sorted.empty() && sorted.front() == nullptr) throw py::type_error("a session is None");
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
      throw std::invalid_argument("a session is there twice; give each once");
    }
    std::vector<std::unique_lock<std::mutex>> locks;
    std::vector<Session*> sessions;
    for (GuardedSession* const session : guarded) {
      locks.push_back(session->enter());
      sessions.push_back(&session->session_);
    }
    Session::step_together(sessions, poll_signals);
  }
  // From `start` on; none: of all pending tokens.
  py::array_t<float> logits(std::optional<size_t> start) {
    const auto [pending, end] =
        call([](Session& session) { return std::pair(session.pending(), session.tokens().size()); });
    const size_t first = start.value_or(end - pending);
    py::array_t<float> out({first < end ? end - first : 0, vocab_size_});
    float* data = out.mutable_data();
    call([data, first, end = end](Session& session) {
      if (session.tokens().size() != end) throw std::runtime_error("this session is in use by another thread");
      session.logits(first, data, poll_signals);
    });
    return out;
  }

 private:
  std::unique_lock<std::mutex> enter() {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) throw std::runtime_error("this session is in use by another thread; give every thread its own session");
    return lock;
  }

  size_t vocab_size_;
  std::mutex mutex_;
  Session session_;
};

std::optional<std::string> finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::eos: return "eos";
    case FinishReason::length: return "length";
    case FinishReason::context: return "context";
    case FinishReason::running: break;
  }
  return std::nullopt;
}

// Of a snapshot's two parts, wherever they are.
void restore_parts(GuardedSession& session, const py::bytes& tokens, const py::buffer& state) {
  const std::string_view ids(tokens);
  if (ids.size() % sizeof(int32_t) != 0) throw std::invalid_argument("tokens are int32: 4 bytes each");
  std::vector<int32_t> copy(ids.size() / sizeof(int32_t));  // of bytes that may lie anywhere
  if (!ids.empty()) std::memcpy(copy.data(), ids.data(), ids.size());
  const py::buffer_info info = state.request();
  const std::span<const std::byte> bytes = bytes_of(info);
  session.call([&](Session& x) { x.restore(copy, bytes); });
}

}  // namespace

void bind_session(py::module_& m) {
  py::class_<MakeDrafter>(m, "MakeDrafter", "How sessions get a drafter, for speculative decoding. Immutable.")
      .def_static("prompt_lookup", &prompt_lookup, "Drafts what followed the last tokens where they occurred before.")
      .def_static(
          "draft_model", [](const std::shared_ptr<Engine>& model) { return draft_model(model); }, "model"_a,
          "Drafts the most probable tokens of a smaller model. A session that takes it raises ValueError if their\n"
          "vocabularies have other sizes.");

  const SessionOptions session;
  py::class_<SessionOptions>(m, "SessionOptions", "What one session needs.")
      .def(py::init([](size_t context, bool prefetch, size_t chunk, const std::optional<MakeDrafter>& drafter,
                       size_t draft_tokens) {
             return SessionOptions{context, prefetch, chunk, drafter.value_or(MakeDrafter()), draft_tokens};
           }),
           py::kw_only(), "context"_a = session.context, "prefetch"_a = session.prefetch, "chunk"_a = session.chunk,
           "drafter"_a = py::none(), "draft_tokens"_a = session.draft_tokens,
           "context: capacity in tokens, 0 for the engine's, at most 4096. prefetch: read rows on the I/O thread\n"
           "ahead of their use; False reads them on the compute thread. chunk: prompt tokens of one prefill step;\n"
           "with the provider \"qnn\" at most those it is compiled for. drafter: None: no speculative decoding.\n"
           "draft_tokens: of a draft at most, 1 to MOST_DRAFT_TOKENS.")
      .def_readonly_static("MOST_DRAFT_TOKENS", &SessionOptions::kMostDraftTokens)
      .def_readonly_static("DEFAULT_DRAFT_TOKENS", &SessionOptions::kDefaultDraftTokens);

  py::class_<Stats>(m, "Stats", "Counters of one session since it was made or last reset. A copy: it does not change.")
      .def_readonly("prefill_tokens", &Stats::prefill_tokens)
      .def_readonly("prefill_ns", &Stats::prefill_ns)
      .def_readonly("prefill_stall_ns", &Stats::prefill_stall_ns)
      .def_readonly("decode_tokens", &Stats::decode_tokens,
                    "That decode steps made: one each, more where drafted tokens were accepted.")
      .def_readonly("decode_ns", &Stats::decode_ns)
      .def_readonly("sample_ns", &Stats::sample_ns, "Of decode_ns: choosing tokens.")
      .def_readonly("stall_ns", &Stats::stall_ns,
                    "Nanoseconds that each decode step waited for its rows; empty in a dense model.")
      .def_readonly("drafted_tokens", &Stats::drafted_tokens, "That decode steps computed beyond the pending token.")
      .def_readonly("accepted_tokens", &Stats::accepted_tokens, "Of these: became part of the sequence.")
      .def_property_readonly(
          "rom_requests", [](const Stats& stats) { return stats.rows.requests; },
          "Bundles that were needed: of one token in a step once.")
      .def_property_readonly(
          "rom_hits", [](const Stats& stats) { return stats.rows.hits; },
          "Of these: were in the row cache. The others were read.")
      .def_property_readonly(
          "rom_bytes", [](const Stats& stats) { return stats.rows.bytes; },
          "Bytes read: bundles without their padding (with O_DIRECT, the blocks around them).");

  py::class_<Logprobs>(m, "Logprobs",
                       "Natural logarithms of probabilities, all that one token was chosen from: by the logits before\n"
                       "penalties, bias and temperature, and of all tokens.")
      .def_readonly("chosen", &Logprobs::chosen, "Of the token itself.")
      .def_readonly("top", &Logprobs::top, "Of the most probable tokens, by their ids.");

  py::class_<Snapshot>(m, "Snapshot", py::buffer_protocol(),
                       "What a session was at one moment: see Session.snapshot. Immutable.")
      .def_property_readonly(
          "tokens",
          [](const Snapshot& s) {
            return py::bytes(reinterpret_cast<const char*>(s.tokens.data()), s.tokens.size() * sizeof(int32_t));
          },
          "Those that were computed, int32, as bytes.")
      .def_property_readonly(
          "state", [](const py::object& s) { return py::memoryview(s); },  // which holds on to the snapshot
          "Their state, read-only.")
      .def_buffer([](const Snapshot& s) {
        const auto size = static_cast<py::ssize_t>(s.state.size());
        return py::buffer_info(reinterpret_cast<const uint8_t*>(s.state.data()), size);
      });

  py::class_<GuardedSession>(
      m, "Session",
      "One sequence: its tokens, KV cache and prefetcher. Use from one thread at a time; RuntimeError tells a\n"
      "second one.")
      .def(py::init([](const std::shared_ptr<Engine>& engine, const SessionOptions& options) {
             const py::gil_scoped_release release;
             return std::make_unique<GuardedSession>(engine, options);
           }),
           "engine"_a, "options"_a)
      .def_property_readonly(
          "context", [](GuardedSession& s) { return s.call(&Session::context); }, "Capacity in tokens.")
      .def_property_readonly(
          "tokens",
          [](GuardedSession& s) {
            return s.call([](Session& x) { return std::vector<int32_t>(x.tokens().begin(), x.tokens().end()); });
          },
          "The sequence so far: prompts and generated tokens.")
      .def(
          "append", [](GuardedSession& s, const std::vector<int64_t>& ids) { s.call(&Session::append, ids); },
          "token_ids"_a,
          "Appends tokens, to be computed by the next call, and ends a running generation. ValueError for an id out\n"
          "of the vocabulary or a sequence that would exceed the context (the message has both numbers).")
      .def(
          "start",
          [](GuardedSession& s, const SamplingOptions& sampling, size_t max_new_tokens,
             std::optional<std::vector<int32_t>> end_token_ids) {
            s.call(&Session::start, sampling, max_new_tokens, std::move(end_token_ids));
          },
          "sampling"_a, "max_new_tokens"_a, "end_token_ids"_a = py::none(),
          "Begins a generation after the current sequence. 0 tokens: until the context is full. Each of\n"
          "`end_token_ids` ends it, None: each of the manifest's. ValueError if the sequence is empty.")
      .def("next", &GuardedSession::next, "allowed"_a = py::none(),
           "The next token, or None when the generation is over (see finish_reason). The rows of a returned token\n"
           "are already being fetched. allowed: a set of tokens to choose from, a bit each, uint32\n"
           "[(vocab_size + 31) / 32]: bit i % 32 of word i / 32 is token i; None: all. ValueError for a set that is\n"
           "too short or has no token; the next call goes on. KeyboardInterrupt is raised between two prefill chunks.")
      .def(
          "step", [](GuardedSession& s) { s.call(&Session::step, poll_signals); },
          "Computes what `next` chooses from, for a caller to whom the allowed tokens become known meanwhile.")
      .def(
          "compute", &GuardedSession::compute, "most"_a,
          "Computes `most` pending tokens, or all if there are fewer, as a part of a prompt; how many are left. What\n"
          "`step` and `next` compute of a prompt is then less. KeyboardInterrupt is raised between two prefill chunks.")
      .def_property_readonly(
          "logprobs", [](GuardedSession& s) { return s.call(&Session::logprobs); },
          "Of the token that `next` returned last; None if the generation was started without.")
      .def_property_readonly(
          "finish_reason", [](GuardedSession& s) { return finish_name(s.call(&Session::finish_reason)); },
          "None while running, \"eos\", \"length\" (max_new_tokens reached) or \"context\" (cache full).")
      .def("logits", &GuardedSession::logits, "start"_a = py::none(),
           "Computes all pending tokens; float32 [tokens from position `start` on, vocab_size], None standing for\n"
           "the first pending one. ValueError for a position that is not pending.")
      .def(
          "rewind", [](GuardedSession& s, size_t length) { s.call(&Session::rewind, length); }, "length"_a,
          "Keeps the first `length` tokens of the sequence. Where a layer with a window does not reach back so far, "
          "all\n"
          "of them are pending.")
      .def(
          "snapshot",
          [](GuardedSession& s, std::optional<size_t> length) {
            return s.call([length](Session& x) { return length ? x.snapshot(*length) : x.snapshot(); });
          },
          "length"_a = py::none(),
          "A copy of the first `length` tokens and their state, None: of all that are computed. Where a layer with a\n"
          "window does not reach back so far, it is of no token. ValueError if fewer are computed.")
      .def(
          "snapshot_bytes", [](GuardedSession& s, size_t length) { return s.call(&Session::snapshot_bytes, length); },
          "length"_a,
          "Bytes of the state in a snapshot of `length` tokens. ValueError for more than the context holds.")
      .def_property_readonly(
          "pending", [](GuardedSession& s) { return s.call(&Session::pending); },
          "How many tokens at the end of the sequence are yet to be computed.")
      .def(
          "restore",
          [](GuardedSession& s, const Snapshot& snapshot) { s.call([&](Session& x) { x.restore(snapshot); }); },
          "snapshot"_a,
          "Becomes what `snapshot` holds, of a session of the same package, provider, KV type and, with the provider\n"
          "\"qnn\", context. ValueError if it does not fit, or a token is outside the vocabulary; then nothing "
          "changes.")
      .def("restore_parts", &restore_parts, "tokens"_a, "state"_a,
           "The same of a snapshot's `tokens` and `state`, each in bytes of whoever has kept them.")
      .def(
          "fill_synthetic", [](GuardedSession& s, size_t count) { s.call(&Session::fill_synthetic, count); }, "count"_a,
          "Appends `count` arbitrary tokens with pseudo-random keys and values, as if computed: for measurements at\n"
          "a depth. ValueError if they exceed the context or tokens are pending.")
      .def(
          "kv_bytes", [](GuardedSession& s, size_t tokens) { return s.call(&Session::kv_bytes, tokens); }, "tokens"_a,
          "Bytes of the KV cache, all layers together, that a step reads after `tokens` tokens.")
      .def_property_readonly("stats", [](GuardedSession& s) { return s.call(&Session::stats); })
      .def("reset_stats", [](GuardedSession& s) { s.call(&Session::reset_stats); });

  m.def(
      "step", &GuardedSession::step_together, "sessions"_a,
      "Session.step of distinct sessions at once: those of an engine that have one pending token and no draft are\n"
      "computed together, whose weights are then read once; the others one after the other. The results are those of\n"
      "single steps. Where a step fails for lack of a good package, the session's own `next` raises PackageError.\n"
      "ValueError for a session that is there twice or has no generation, RuntimeError for one that is in use.");
}

}  // namespace meki
