// Sessions whose next token is one of those that the caller allows.

#include <stdexcept>

#include "runtime/engine/session.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

TEST_CASE("session: a step before each token changes nothing, and the token is one of those allowed") {
  const FakeModel model(Kind::two_stages);
  constexpr size_t kWords = (FakeModel::kVocab + 31) / 32;
  const std::vector<uint32_t> all(kWords, ~uint32_t{0});
  Session session(model.engine, {});
  CHECK_THROWS_AS(session.step(), std::invalid_argument);  // no generation was started
  session.append(kPrompt);
  session.start(kGreedy, 6);
  Ids made;
  while (true) {
    session.step();
    session.step();  // there is nothing left to compute
    const std::optional<int32_t> token = session.next({}, all);
    if (!token) break;
    made.push_back(*token);
  }
  CHECK(made == model.greedy(kPrompt, 6));
  const Stats stats = session.stats();
  CHECK(stats.prefill_tokens == kPrompt.size());
  CHECK(stats.decode_tokens == 5);

  session.start(kGreedy, 2);
  const std::vector<uint32_t> none(kWords);
  CHECK_THROWS_AS(session.next({}, none), std::invalid_argument);
  CHECK(session.stats().decode_tokens == 5);
  std::vector<uint32_t> one(kWords);
  one[0] = 1U << 7;
  CHECK(session.next({}, one) == 7);
  CHECK(tokens_of(session).back() == 7);
  CHECK(session.stats().decode_tokens == 6);
}

}  // namespace
}  // namespace meki
