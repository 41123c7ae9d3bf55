// runtime/engine/drafter: what is drafted, and sessions with it.

#include "runtime/engine/drafter.h"

#include <memory>
#include <stdexcept>

#include "runtime/base/error.h"
#include "runtime/engine/session.h"
#include "runtime/executor/dynamic.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_compiled.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

TEST_CASE("drafter: prompt lookup drafts what followed the longest earlier occurrence of the last tokens") {
  const FakeModel model(Kind::dense);
  const auto drafter = prompt_lookup()(*model.engine, 48);
  const auto draft = [&](const std::vector<int32_t>& sequence, size_t most) {
    std::vector<int32_t> ids(most);
    ids.resize(drafter->draft(sequence, ids, {}));
    return ids;
  };
  using Tokens = std::vector<int32_t>;
  CHECK(draft({1}, 3).empty());
  CHECK(draft({1, 2, 3}, 3).empty());
  CHECK(draft({1, 2, 9, 1, 2}, 3).empty());  // two tokens alike are no match
  CHECK(draft({1, 2, 3, 7, 8, 9, 1, 2, 3}, 3) == Tokens{7, 8, 9});
  CHECK(draft({1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3}, 2) == Tokens{8, 1});           // the later one of two
  CHECK(draft({6, 1, 2, 3, 7, 5, 1, 2, 3, 8, 6, 1, 2, 3}, 2) == Tokens{7, 5});  // the longer one of two
  CHECK(draft({4, 5, 4, 5, 4, 5}, 5) == Tokens{4, 5, 4, 5, 4});                 // beyond its own end
  CHECK(draft({0, 1, 1, 1, 1}, 3) == Tokens{1, 1, 1});
}

TEST_CASE("drafter: a session with prompt lookup makes the same text") {
  const FakeModel model(Kind::two_stages);
  // A prompt whose end and next token have occurred in it: what followed is drafted, and refused.
  Ids prompt;
  for (int64_t id = 0; prompt.empty() && id < FakeModel::kVocab * FakeModel::kVocab; ++id) {
    const int64_t next = id % FakeModel::kVocab;
    const Ids candidate = concat({5, 3, next, id / FakeModel::kVocab, 8}, kPrompt);
    if (model.greedy(candidate, 1)[0] == next) prompt = candidate;
  }
  Session session(model.engine, {.drafter = prompt_lookup()});
  session.append(prompt);
  session.start(kGreedy, 0);
  CHECK(drain(session) == model.greedy(prompt, FakeModel::kContext - prompt.size()));
  CHECK(session.stats().drafted_tokens > 0);
}

TEST_CASE("drafter: a draft model is right where it is the model, and changes nothing where it is another one") {
  const FakeModel model(Kind::two_stages);
  const FakeModel other(Kind::dense);
  for (const FakeModel* draft : {&model, &other}) {
    Session session(model.engine, {.drafter = draft_model(draft->engine)});
    session.append(kPrompt);
    session.start(kGreedy, 15);
    CHECK(drain(session) == model.greedy(kPrompt, 15));
    const Stats stats = session.stats();
    CHECK(stats.drafted_tokens > 0);
    if (draft == &model) CHECK(stats.accepted_tokens == stats.drafted_tokens);
    session.rewind(4);  // the draft model goes back, too
    session.append(Ids{20, 21});
    session.start(kGreedy, 0);
    const Ids kept = {kPrompt[0], kPrompt[1], kPrompt[2], kPrompt[3], 20, 21};
    CHECK(drain(session) == model.greedy(kept, FakeModel::kContext - 6));
  }
}

TEST_CASE("drafter: a draft model with a shorter context drafts until that is full") {
  const FakeModel model(Kind::two_stages);
  const FakeCompiledModel draft(FakeCompiledModel::Kind::dense);  // for half as many tokens
  Session session(model.engine, {.drafter = draft_model(draft.engine)});
  session.append(kPrompt);
  session.start(kGreedy, 0);
  drain(session, FakeCompiledModel::kContext - kPrompt.size() + 1);
  const uint64_t drafted = session.stats().drafted_tokens;
  CHECK(drafted > 0);
  drain(session);
  CHECK(tokens_of(session) == concat(kPrompt, model.greedy(kPrompt, FakeModel::kContext - kPrompt.size())));
  CHECK(session.stats().drafted_tokens == drafted);
}

TEST_CASE("drafter: an error or an interruption of the draft model loses nothing") {
  const FakeModel model(Kind::dense);
  const FakeModel draft(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 8);
  Session session(model.engine, {.drafter = draft_model(draft.engine)});
  session.append(kPrompt);
  session.start(kGreedy, 8);
  Ids made = drain(session, 1);
  draft.damage(kPrompt[0]);
  for (int attempt = 0; attempt < 2; ++attempt) {
    check_names(error_of<PackageError>([&] { session.next(); }), "bundle " + std::to_string(kPrompt[0]));
    CHECK(tokens_of(session) == concat(kPrompt, made));
  }
  draft.repair(kPrompt[0]);
  struct Interrupt {};
  CHECK_THROWS_AS(session.next([] { throw Interrupt(); }), Interrupt);  // behind the prompt of the draft model
  CHECK(tokens_of(session) == concat(kPrompt, made));
  CHECK(concat(made, drain(session)) == expected);
}

TEST_CASE("drafter: what cannot be is refused") {
  const FakeModel model(Kind::two_stages);
  for (const size_t wrong : {0U, 16U}) {
    const SessionOptions options{.drafter = prompt_lookup(), .draft_tokens = wrong};
    const std::string message = error_of<std::invalid_argument>([&] { Session(model.engine, options); });
    check_names(message, "draft_tokens is " + std::to_string(wrong) + ", expected 1 to 15");
  }
  Manifest manifest;
  manifest.architecture = model.engine->manifest().architecture;
  manifest.architecture.vocab_size = 40;
  manifest.stages = {{"stage", std::nullopt}};
  const GraphLoader load = [](const std::filesystem::path&) {
    return std::make_unique<FakeGraph>(
        std::vector<std::string>{"token_ids", "total_sequence_length", "past.0", "past.1", "past.2", "logit_index"},
        std::vector<std::string>{"present.0", "present.1", "present.2", "logits"});
  };
  const auto larger =
      std::make_shared<const Engine>(nullptr, std::make_shared<DynamicBackend>(manifest, KvType::float32, load), 1);
  const std::string message =
      error_of<std::invalid_argument>([&] { Session(model.engine, {.drafter = draft_model(larger)}); });
  check_names(message, "40 tokens");
  check_names(message, "37");
}

TEST_CASE("drafter: drafts grow with success and pause after failures") {
  DraftLength length(12);
  CHECK(length.next() == 3);
  length.update(3, 3);
  CHECK(length.next() == 7);
  length.update(7, 7);
  CHECK(length.next() == 12);
  length.update(12, 12);
  CHECK(length.next() == 12);
  length.update(12, 11);
  CHECK(length.next() == 11);
  length.update(11, 6);
  CHECK(length.next() == 7);
  for (const size_t pause : {1U, 2U, 4U, 8U, 16U, 32U, 32U}) {
    length.update(7, 0);
    for (size_t step = 0; step < pause; ++step) CHECK(length.next() == 0);
    CHECK(length.next() == 3);
  }
  length.update(3, 1);
  CHECK(length.next() == 3);
  length.update(3, 0);
  CHECK(length.next() == 0);
  CHECK(length.next() == 3);
  CHECK(DraftLength(1).next() == 1);
}

}  // namespace
}  // namespace meki
