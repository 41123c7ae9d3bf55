// Steps that several sessions take together.

#include <algorithm>
#include <array>
#include <chrono>

#include "runtime/base/error.h"
#include "runtime/engine/session.h"

namespace meki {

// Whether the session's next step can be one with others of this engine.
bool Session::joins(const Engine& engine) const {
  engine_->check_process();
  return engine_.get() == &engine && sampler_ && finish_reason_ == FinishReason::running && pending() == 1 &&
         drafter_ == nullptr;
}

void Session::step_together(std::span<Session* const> sessions, const Poll& poll) {
  std::array<Session*, BatchExecutor::kMost> group;
  size_t members = 0;
  for (Session* const session : sessions) {
    if (session->joins(members > 0 ? *group[0]->engine_ : *session->engine_)) {
      group[members++] = session;
      if (members < group.size()) continue;
      run_batch(group, poll);
      members = 0;
    } else {
      session->step_or_leave(poll);
    }
  }
  run_batch(std::span(group).first(members), poll);
}

// Takes a step, unless that throws PackageError: next() will do it again.
void Session::step_or_leave(const Poll& poll) {
  try {
    step(poll);
  } catch (const PackageError&) {
  }
}

// Sessions that join each other, up to BatchExecutor::kMost.
void Session::run_batch(std::span<Session* const> sessions, const Poll& poll) {
  const auto start = std::chrono::steady_clock::now();
  std::array<BatchMember, BatchExecutor::kMost> members;
  for (size_t i = 0; sessions.size() > 1 && i < sessions.size(); ++i) {
    Session& session = *sessions[i];
    if (!session.rows_) session.rows_ = session.request_rows(session.computed(), 1);
    members[i] = {.executor = session.executor_.get(),
                  .token = session.tokens_[session.computed()],
                  .rows = session.rows_ ? &session.rows_ : nullptr};
  }
  const std::span<BatchMember> used(members.data(), sessions.size());
  if (sessions.size() < 2 || !sessions.front()->engine_->run_batch(used)) {
    for (Session* const session : sessions) session->step_or_leave(poll);
    return;
  }
  const auto elapsed = std::chrono::steady_clock::now() - start;
  const auto ns = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
  for (size_t i = 0; i < sessions.size(); ++i) sessions[i]->take_step(members[i], ns);
}

// After a shared step of so many nanoseconds.
void Session::take_step(const BatchMember& member, uint64_t ns) {
  rows_ = {};
  logits_ = {};
  if (!member.computed) return;
  logits_ = executor_->last_logits();
  if (generating_) {
    stats_.decode_ns += ns;
    if (prefetcher_ != nullptr) stats_.stall_ns.push_back(member.stall);  // start() made room
  } else {
    stats_.prefill_ns += ns;
    stats_.prefill_stall_ns += member.stall;
    ++stats_.prefill_tokens;
  }
}

}  // namespace meki
