// runtime/engine/session with a drafter: the same texts as without one, whatever is drafted, and nothing of a draft in
// the sequence before next() hands it out.

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>

#include "runtime/base/error.h"
#include "runtime/engine/session.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_compiled.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

// What to draft behind a sequence: as many tokens, or fewer.
using Script = std::function<Ids(const Ids& sequence, size_t most)>;

class ScriptedDrafter final : public Drafter {
 public:
  ScriptedDrafter(Script script, bool immediate) : script_(std::move(script)), immediate_(immediate) {}
  bool immediate() const override { return immediate_; }
  size_t draft(std::span<const int32_t> sequence, std::span<int32_t> draft, const Poll&) override {
    const Ids ids = script_({sequence.begin(), sequence.end()}, draft.size());
    REQUIRE(ids.size() <= draft.size());
    std::transform(ids.begin(), ids.end(), draft.begin(), [](int64_t id) { return static_cast<int32_t>(id); });
    return ids.size();
  }

 private:
  Script script_;
  bool immediate_;
};

MakeDrafter scripted(Script script, bool immediate = true) {
  return [=](const Engine&, size_t) { return std::make_unique<ScriptedDrafter>(script, immediate); };
}

template <class Model>
Script right(const Model& model) {
  return [&model](const Ids& sequence, size_t most) { return model.greedy(sequence, most); };
}

// The first `good` tokens are right, and one that is not follows.
template <class Model>
Script right_for(const Model& model, size_t good) {
  return [&model, good](const Ids& sequence, size_t most) {
    Ids ids = model.greedy(sequence, most);
    if (good < most) ids[good] = (ids[good] + 1) % FakeModel::kVocab;
    return ids;
  };
}

Script wrong() {
  return [](const Ids&, size_t most) { return Ids(most, 36); };
}

// Any number of any tokens, now and then the right ones.
template <class Model>
Script random_of(const Model& model) {
  return [&model, random = std::make_shared<std::mt19937>(5)](const Ids& sequence, size_t most) {
    Ids ids = model.greedy(sequence, (*random)() % (most + 1));
    for (int64_t& id : ids) {
      if ((*random)() % 4 == 0) id = static_cast<int64_t>((*random)() % FakeModel::kVocab);
    }
    return ids;
  };
}

template <class Model>
std::vector<Script> scripts(const Model& model) {
  return {right(model), right_for(model, 1), right_for(model, 3),
          wrong(),      random_of(model),    [](const Ids&, size_t) { return Ids(); }};
}

template <class Model>
void check_texts(const Model& model, size_t context) {
  const SamplingOptions sampling{
      .temperature = 5, .top_p = 0.9, .repetition_penalty = 1.3, .frequency_penalty = 0.8, .seed = 9};
  const size_t room = context - kPrompt.size();
  Session plain(model.engine, {});
  plain.append(kPrompt);
  plain.start(sampling, 0);
  const Ids sampled = drain(plain);
  REQUIRE(sampled.size() == room);
  const Ids greedy = model.greedy(kPrompt, room);
  for (const Script& script : scripts(model)) {
    for (const bool immediate : {true, false}) {
      for (const bool prefetch : {true, false}) {
        for (const size_t chunk : {1U, 3U, 256U}) {
          for (const size_t most : {1U, 4U, 15U}) {
            CAPTURE(chunk);
            CAPTURE(most);
            Session session(
                model.engine,
                {.prefetch = prefetch, .chunk = chunk, .drafter = scripted(script, immediate), .draft_tokens = most});
            session.append(kPrompt);
            session.start(kGreedy, 0);
            CHECK(drain(session) == greedy);
            CHECK(session.finish_reason() == FinishReason::context);
            CHECK(session.tokens().size() == session.context());
            session.rewind(kPrompt.size());
            session.start(sampling, 0);
            CHECK(drain(session) == sampled);
          }
        }
      }
    }
  }
}

TEST_CASE("speculation: texts are those without a drafter, greedy and sampled, of every kind of stages") {
  for (const Kind kind : {Kind::dense, Kind::two_stages, Kind::three_stages}) {
    check_texts(FakeModel(kind), FakeModel::kContext);
  }
  check_texts(FakeCompiledModel(FakeCompiledModel::Kind::two_stages), FakeCompiledModel::kContext);
}

// A session that has `made` tokens of a generation of `model`, from a drafter that is right.
struct Begun {
  Begun(const FakeModel& model, size_t made, bool immediate)
      : session(model.engine, {.chunk = 16, .drafter = scripted(right(model), immediate), .draft_tokens = 5}) {
    session.append(kPrompt);
    session.start(kGreedy, 0);
    tokens = concat(kPrompt, drain(session, made));
  }
  Session session;
  Ids tokens;
};

// Calls `check(session, its tokens)` after every number of tokens: in the middle of drafts and between two.
void at_every_token(const FakeModel& model, const std::function<void(Session&, const Ids&)>& check) {
  for (const bool immediate : {true, false}) {
    for (size_t made = 1; made < 14; ++made) {
      CAPTURE(made);
      Begun begun(model, made, immediate);
      CHECK(tokens_of(begun.session) == begun.tokens);
      CHECK(begun.tokens.size() == kPrompt.size() + made);
      CHECK(begun.session.pending() <= 1);
      check(begun.session, begun.tokens);
    }
  }
}

TEST_CASE("speculation: what is drafted is no part of the sequence, whatever is called") {
  const FakeModel model(Kind::two_stages);
  size_t ahead = 0;
  at_every_token(model, [&](Session& session, const Ids& tokens) {
    ahead += session.pending() == 0 ? 1 : 0;
    session.append({});
    session.rewind(tokens.size());
    CHECK(drain(session, 4) == model.greedy(tokens, 4));
  });
  CHECK(ahead > 10);
  at_every_token(model, [&](Session& session, const Ids& tokens) {
    session.append(Ids{20, 21});
    CHECK_THROWS_AS(session.next(), std::invalid_argument);
    const Ids branch = concat(tokens, {20, 21});
    CHECK(tokens_of(session) == branch);
    const size_t pending = session.pending();
    CHECK(pending_logits(session) == expected_logits(model, branch, branch.size() - pending));
  });
  at_every_token(model, [&](Session& session, const Ids& tokens) {
    session.compute();
    CHECK(session.pending() == 0);
    CHECK(pending_logits(session).empty());
    CHECK(drain(session, 4) == model.greedy(tokens, 4));
  });
  at_every_token(model, [&](Session& session, const Ids& tokens) {  // fewer than are drafted
    session.start(kGreedy, 2);
    CHECK(drain(session) == model.greedy(tokens, 2));
    CHECK(session.finish_reason() == FinishReason::length);
    session.start(kGreedy, 3);
    CHECK(drain(session) == model.greedy(concat(tokens, model.greedy(tokens, 2)), 3));
  });
  at_every_token(model, [&](Session& session, const Ids& tokens) {
    for (size_t length : {tokens.size() - 1, size_t{5}}) {
      session.rewind(length);
      const Ids kept(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(length));
      CHECK(tokens_of(session) == kept);
      session.start(kGreedy, 3);
      CHECK(drain(session) == model.greedy(kept, 3));
      session.rewind(length);
    }
  });
  at_every_token(model, [&](Session& session, const Ids& tokens) {
    const Snapshot snapshot = session.snapshot();
    const Ids computed(tokens.begin(), tokens.end() - static_cast<std::ptrdiff_t>(session.pending()));
    CHECK(Ids(snapshot.tokens.begin(), snapshot.tokens.end()) == computed);
    CHECK(drain(session, 4) == model.greedy(tokens, 4));  // it goes on as if nobody had looked
    Session fork(model.engine, {});
    for (Session* other : {&fork, &session}) {
      other->restore(snapshot);
      CHECK(tokens_of(*other) == computed);
      other->start(kGreedy, 4);
      CHECK(drain(*other) == model.greedy(computed, 4));
    }
  });
  at_every_token(model, [&](Session& session, const Ids& tokens) {
    session.compute();
    session.fill_synthetic(3);
    CHECK(session.tokens().size() == tokens.size() + 3);
    CHECK(session.pending() == 0);
    session.rewind(tokens.size());
    CHECK(tokens_of(session) == tokens);
  });
}

TEST_CASE("speculation: a generation ends at the end token, the length or the context in the middle of a draft") {
  const Ids free_run = FakeModel(Kind::two_stages).greedy(kPrompt, 20);
  for (size_t at = 0; at < 12; ++at) {
    const int64_t eos = free_run[at];
    const auto first = std::find(free_run.begin(), free_run.end(), eos);
    const Ids expected(free_run.begin(), first);
    const FakeModel model(Kind::two_stages, {static_cast<int32_t>(eos)});
    for (const bool immediate : {true, false}) {
      Session session(model.engine, {.drafter = scripted(right(model), immediate)});
      session.append(kPrompt);
      for (int round = 0; round < 2; ++round) {  // the second time behind the same sequence, which ends it again
        session.start(kGreedy, 0);
        CHECK(drain(session) == (round == 0 ? expected : Ids()));
        CHECK(session.finish_reason() == FinishReason::eos);
        CHECK_FALSE(session.next());
        CHECK(tokens_of(session) == concat(kPrompt, expected));
        CHECK(session.pending() == 0);
      }
      session.append(Ids{1});
      session.start(kGreedy, 1, std::vector<int32_t>());
      const Ids sequence = concat(concat(kPrompt, expected), {1});
      CHECK(drain(session) == model.greedy(sequence, 1));
    }
  }
  const FakeModel model(Kind::two_stages);
  for (size_t count = 1; count < 20; ++count) {
    for (const bool immediate : {true, false}) {
      const MakeDrafter drafter = scripted(right(model), immediate);
      const Ids expected(free_run.begin(), free_run.begin() + static_cast<std::ptrdiff_t>(count));
      Session by_length(model.engine, {.drafter = drafter});
      Session by_context(model.engine, {.context = kPrompt.size() + count, .drafter = drafter});
      by_length.append(kPrompt);
      by_context.append(kPrompt);
      by_length.start(kGreedy, count);
      by_context.start(kGreedy, 0);
      CHECK(drain(by_length) == expected);
      CHECK(drain(by_context) == expected);
      CHECK(by_length.finish_reason() == FinishReason::length);
      CHECK(by_context.finish_reason() == FinishReason::context);
      CHECK(by_context.tokens().size() == by_context.context());
    }
  }
}

TEST_CASE("speculation: counters, and steps that are saved") {
  const FakeModel model(Kind::two_stages);
  const auto run = [&](const Script& script, size_t most) {
    size_t steps = 0;
    Session session(model.engine, {.drafter = scripted(script), .draft_tokens = most});
    session.append(kPrompt);
    session.compute();
    session.reset_stats();
    model.fault.on_run = [&](int64_t, int64_t) { ++steps; };
    session.start(kGreedy, 30);
    drain(session);
    model.fault.on_run = {};
    const Stats stats = session.stats();
    CHECK(stats.decode_tokens == 29);           // the first one comes from the prompt
    CHECK(stats.stall_ns.size() == steps / 2);  // two stages
    CHECK(stats.rows.requests > 0);
    return std::tuple(steps / 2, stats.drafted_tokens, stats.accepted_tokens);
  };
  // A step of four tokens, and five of five.
  CHECK(run(right(model), 4) == std::tuple(6U, 23U, 23U));
  CHECK(run([](const Ids&, size_t) { return Ids(); }, 4) == std::tuple(29U, 0U, 0U));
  // A wrong draft of three before steps 0, 2, 5, 10 and 19: pauses of 1, 2, 4, 8 and 16 steps lie between.
  CHECK(run(wrong(), 4) == std::tuple(29U, 15U, 0U));
}

TEST_CASE("speculation: rows and stages that fail for a draft alone are no failure, others are") {
  const FakeModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 20);
  int64_t unused = 0;  // a token of neither prompt nor text
  while (std::ranges::count(concat(kPrompt, expected), unused) > 0) ++unused;
  for (const bool prefetch : {true, false}) {
    for (const bool immediate : {true, false}) {
      const Script script = [&, unused](const Ids& sequence, size_t most) {
        Ids ids = model.greedy(sequence, most);
        ids.back() = unused;
        return ids;
      };
      Session session(model.engine, {.prefetch = prefetch, .drafter = scripted(script, immediate)});
      session.append(kPrompt);
      session.start(kGreedy, 20);
      model.damage(unused);
      CHECK(drain(session) == expected);
      model.repair(unused);
    }
    for (const int64_t bad : expected) {
      if (std::ranges::count(kPrompt, bad) > 0) continue;
      const auto until = std::find(expected.begin(), expected.end(), bad) + 1;
      if (until == expected.end()) continue;  // whose rows nothing needs
      Session session(model.engine, {.prefetch = prefetch, .drafter = scripted(right(model))});
      session.append(kPrompt);
      session.start(kGreedy, 20);
      model.damage(bad);
      Ids made;
      check_names(error_of<PackageError>([&] {
                    while (const auto token = session.next()) made.push_back(*token);
                  }),
                  "bundle " + std::to_string(bad));
      CHECK(made == Ids(expected.begin(), until));
      CHECK(tokens_of(session) == concat(kPrompt, made));
      model.repair(bad);
      CHECK(concat(made, drain(session)) == expected);
    }
    for (int failing = 1; failing <= 12; ++failing) {
      CAPTURE(failing);
      for (const bool immediate : {true, false}) {
        Session session(model.engine, {.prefetch = prefetch, .drafter = scripted(right_for(model, 2), immediate)});
        session.append(kPrompt);
        session.start(kGreedy, 20);
        model.fault.countdown = failing;
        CHECK(drain_past_a_fault(session) == expected);
      }
    }
  }
}

TEST_CASE("speculation: an error of the drafter comes from next(), and the session goes on") {
  const FakeModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 12);
  int failing = 2;
  Session session(model.engine, {.drafter = scripted(
                                     [&](const Ids& sequence, size_t most) {
                                       if (--failing == 0) throw std::runtime_error("fake fault");
                                       return model.greedy(sequence, most);
                                     },
                                     false)});
  session.append(kPrompt);
  session.start(kGreedy, 12);
  CHECK(drain_past_a_fault(session) == expected);
  CHECK(tokens_of(session) == concat(kPrompt, expected));
}

// float64 [vocab]: e^(logit / temperature), normalised.
std::vector<double> probabilities(const FakeModel& model, const Ids& tokens, double temperature) {
  std::vector<double> out;
  for (const float logit : model.logits(tokens)) out.push_back(std::exp(logit / temperature));
  double sum = 0;
  for (const double value : out) sum += value;
  for (double& value : out) value /= sum;
  return out;
}

TEST_CASE("speculation: sampled tokens have the model's distribution, whatever is drafted") {
  constexpr size_t kSamples = 4000;
  constexpr double kTemperature = 8;
  const FakeModel model(Kind::dense);
  const Ids prompt = {3, 1, 4};
  // Of the third token: the first is sampled without a draft, the second and the third are or are not drafted.
  std::vector<double> expected(FakeModel::kVocab);
  const std::vector<double> first = probabilities(model, prompt, kTemperature);
  for (int64_t a = 0; a < FakeModel::kVocab; ++a) {
    const std::vector<double> second = probabilities(model, concat(prompt, {a}), kTemperature);
    for (int64_t b = 0; b < FakeModel::kVocab; ++b) {
      const std::vector<double> third = probabilities(model, concat(prompt, {a, b}), kTemperature);
      const double both = first[static_cast<size_t>(a)] * second[static_cast<size_t>(b)];
      for (size_t c = 0; c < FakeModel::kVocab; ++c) expected[c] += both * third[c];
    }
  }
  for (const Script& script : {right(model), random_of(model)}) {
    std::vector<double> counts(FakeModel::kVocab);
    size_t accepted = 0;
    for (size_t seed = 0; seed < kSamples; ++seed) {
      Session session(model.engine, {.context = 8, .drafter = scripted(script)});
      session.append(prompt);
      session.start({.temperature = kTemperature, .top_p = 1, .seed = seed}, 4);
      ++counts[static_cast<size_t>(drain(session)[2])];
      accepted += session.stats().accepted_tokens;
    }
    CHECK(accepted > kSamples / 40);
    double chi_square = 0;
    for (size_t id = 0; id < counts.size(); ++id) {
      const double wanted = expected[id] * kSamples;
      REQUIRE(wanted > 5);
      chi_square += (counts[id] - wanted) * (counts[id] - wanted) / wanted;
    }
    CHECK(chi_square < 68);  // what 36 degrees of freedom exceed once in a thousand times
  }
}

}  // namespace
}  // namespace meki
