#pragma once

// Helpers of the tests that drive sessions of a FakeModel or FakeCompiledModel.

#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "runtime/engine/session.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki::test {

using Ids = std::vector<int64_t>;

inline const SamplingOptions kGreedy{.temperature = 0};
inline const Ids kPrompt = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3};

inline Ids tokens_of(const Session& session) { return {session.tokens().begin(), session.tokens().end()}; }

inline Ids concat(Ids first, const Ids& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// The tokens that next() gives until the generation is over, or `limit` of them.
inline Ids drain(Session& session, size_t limit = 1000) {
  Ids made;
  while (made.size() < limit) {
    const std::optional<int32_t> token = session.next();
    if (!token) break;
    made.push_back(*token);
  }
  return made;
}

// The same, for a generation on whose way there is one fault of the fake's: it goes on where it was.
inline Ids drain_past_a_fault(Session& session) {
  Ids made;
  int errors = 0;
  while (session.finish_reason() == FinishReason::running && errors < 2) {
    try {
      if (const std::optional<int32_t> token = session.next()) made.push_back(*token);
    } catch (const std::runtime_error& error) {
      check_names(error.what(), "fake fault");
      ++errors;
    }
  }
  CHECK(errors == 1);
  return made;
}

inline std::vector<float> pending_logits(Session& session) {
  std::vector<float> out(session.pending() * FakeModel::kVocab);
  session.logits(session.tokens().size() - session.pending(), out.data());
  return out;
}

// The expected logits of tokens `first` and later. Exact: the fake computes in integers.
template <class Model>
std::vector<float> expected_logits(const Model& model, const Ids& tokens, size_t first = 0) {
  std::vector<float> out;
  for (size_t end = first + 1; end <= tokens.size(); ++end) {
    const std::vector<float> row = model.logits(std::span(tokens).first(end));
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

}  // namespace meki::test
