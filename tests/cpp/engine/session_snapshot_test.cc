// runtime/engine/session: snapshots of a sequence and its state.

#include <stdexcept>

#include "runtime/engine/session.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_compiled.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

// A model over fake stages of either kind, each with its own context.
template <class Model>
void check_snapshots(const Model& model) {
  Session session(model.engine, {.chunk = 3});
  session.append(kPrompt);
  session.start(kGreedy, 0);
  const Ids made = drain(session, 4);
  const Snapshot snapshot = session.snapshot();
  CHECK(Ids(snapshot.tokens.begin(), snapshot.tokens.end()) == concat(kPrompt, Ids(made.begin(), made.end() - 1)));
  const Ids sequence(snapshot.tokens.begin(), snapshot.tokens.end());

  Session fork(model.engine, {});
  fork.append(Ids{30, 31});
  fork.compute();
  fork.restore(snapshot);
  CHECK(tokens_of(fork) == sequence);
  CHECK(fork.pending() == 0);
  fork.start(kGreedy, 3);
  CHECK(drain(fork) == model.greedy(sequence, 3));
  CHECK(drain(session, 2) == model.greedy(concat(sequence, {made.back()}), 2));  // on its own way

  session.restore(snapshot);  // back in time
  CHECK_THROWS_AS(session.next(), std::invalid_argument);
  session.append(Ids{20});
  CHECK(pending_logits(session) == expected_logits(model, concat(sequence, {20}), sequence.size()));

  Snapshot broken = snapshot;
  broken.state.pop_back();
  check_names(error_of<std::invalid_argument>([&] { session.restore(broken); }), std::to_string(broken.state.size()));
  broken = snapshot;
  broken.tokens.resize(1000);
  check_names(error_of<std::invalid_argument>([&] { session.restore(broken); }), "1000");
  broken = snapshot;
  broken.tokens[1] = static_cast<int32_t>(FakeModel::kVocab);
  check_names(error_of<std::invalid_argument>([&] { session.restore(broken); }), "outside the vocabulary");
  CHECK(tokens_of(session) == concat(sequence, {20}));

  for (size_t length = 0; length <= sequence.size(); ++length) {  // of earlier tokens: as if it had ended there
    const Snapshot part = fork.snapshot(length);
    CHECK(part.state.size() == fork.snapshot_bytes(length));
    Session other(model.engine, {});
    other.restore(part);
    CHECK(tokens_of(other) == Ids(sequence.begin(), sequence.begin() + static_cast<std::ptrdiff_t>(length)));
    other.append(Ids{20});
    const Ids longer = tokens_of(other);
    CHECK(pending_logits(other) == expected_logits(model, longer, length));
  }
  const size_t more = fork.tokens().size() - fork.pending() + 1;
  check_names(error_of<std::invalid_argument>([&] { fork.snapshot(more); }), std::to_string(more));
  CHECK_THROWS_AS(fork.snapshot_bytes(fork.context() + 1), std::invalid_argument);

  const Snapshot empty = Session(model.engine, {}).snapshot();
  CHECK(empty.tokens.empty());
  session.restore(empty);
  session.append(kPrompt);
  CHECK(pending_logits(session) == expected_logits(model, kPrompt));
}

TEST_CASE("session: a snapshot is a sequence as it was, here or in another session of the engine") {
  check_snapshots(FakeModel(Kind::two_stages));
  check_snapshots(FakeModel(Kind::dense));
  check_snapshots(FakeCompiledModel(FakeCompiledModel::Kind::two_stages));
}

}  // namespace
}  // namespace meki
