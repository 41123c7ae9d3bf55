// runtime/engine/session: what it computes, over fake stages (fake_graph.h) and a real ROM file.

#include "runtime/engine/session.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>

#include "runtime/executor/dynamic.h"
#include "tests/cpp/engine/session_support.h"
#include "tests/cpp/executor/fake_graph.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using namespace test;
using Kind = FakeModel::Kind;

// A dense engine of these stages.
std::shared_ptr<const Engine> engine_of(const Manifest& manifest, KvType type, const GraphLoader& load) {
  return std::make_shared<const Engine>(nullptr, std::make_shared<DynamicBackend>(manifest, type, load), 1);
}

TEST_CASE("session: logits are the model's, whatever the stages, chunks and prefetching") {
  for (const Kind kind : {Kind::dense, Kind::one_stage, Kind::two_stages, Kind::three_stages}) {
    const FakeModel model(kind);
    const std::vector<float> expected = expected_logits(model, kPrompt);
    for (const bool prefetch : {true, false}) {
      for (const size_t chunk : {1U, 3U, 5U, 10U, 256U}) {
        CAPTURE(chunk);
        Session session(model.engine, {.prefetch = prefetch, .chunk = chunk});
        session.append(kPrompt);
        CHECK(session.pending() == kPrompt.size());
        CHECK(pending_logits(session) == expected);
        CHECK(session.pending() == 0);
        CHECK(pending_logits(session).empty());
      }
      Session session(model.engine, {.prefetch = prefetch});
      std::vector<float> one_by_one;
      for (const int64_t token : kPrompt) {
        session.append(std::span(&token, 1));
        const std::vector<float> row = pending_logits(session);
        one_by_one.insert(one_by_one.end(), row.begin(), row.end());
      }
      CHECK(one_by_one == expected);
      CHECK(tokens_of(session) == kPrompt);
    }
  }
}

TEST_CASE("session: greedy generation is the model's, with every kind of stages and prefetching") {
  for (const Kind kind : {Kind::dense, Kind::one_stage, Kind::two_stages, Kind::three_stages}) {
    const FakeModel model(kind);
    const Ids expected = model.greedy(kPrompt, 20);
    REQUIRE(std::set<int64_t>(expected.begin(), expected.end()).size() > 5);  // a lively model
    for (const bool prefetch : {true, false}) {
      for (const size_t chunk : {1U, 4U, 256U}) {
        Session session(model.engine, {.prefetch = prefetch, .chunk = chunk});
        session.append(kPrompt);
        session.start(kGreedy, 20);
        CHECK(session.finish_reason() == FinishReason::running);
        CHECK(drain(session) == expected);
        CHECK(session.finish_reason() == FinishReason::length);
        CHECK_FALSE(session.next());
        CHECK(tokens_of(session) == concat(kPrompt, expected));
      }
    }
  }
}

TEST_CASE("session: sampled generation depends on the seed alone") {
  const FakeModel model(Kind::two_stages);
  const auto sampled = [&model](uint64_t seed, bool prefetch, size_t chunk) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = chunk});
    session.append(kPrompt);
    session.start({.temperature = 5, .top_p = 1, .repetition_penalty = 1.3, .seed = seed}, 20);
    return drain(session);
  };
  CHECK(sampled(1, true, 256) == sampled(1, false, 3));
  CHECK(sampled(1, true, 256) != sampled(2, true, 256));
}

TEST_CASE("session: turns continue one sequence") {
  const FakeModel model(Kind::two_stages);
  for (const bool prefetch : {true, false}) {
    Session session(model.engine, {.prefetch = prefetch, .chunk = 4});
    Ids tokens;
    for (const Ids& prompt : {Ids{7}, Ids{8, 9, 10, 11, 12}, Ids{13, 13}}) {
      session.append(prompt);
      tokens = concat(tokens, prompt);
      session.start(kGreedy, 3);
      const Ids expected = model.greedy(tokens, 3);
      CHECK(drain(session) == expected);
      tokens = concat(tokens, expected);
    }
    // And without a new prompt, as if it had not stopped.
    session.start(kGreedy, 4);
    CHECK(drain(session) == model.greedy(tokens, 4));
  }
}

TEST_CASE("session: each of the given end tokens ends a generation, and no other does") {
  const FakeModel model(Kind::two_stages);
  const Ids expected = model.greedy(kPrompt, 8);
  Session session(model.engine, {});
  session.append(kPrompt);
  session.start(kGreedy, 8, std::vector<int32_t>{FakeModel::kVocab - 1, static_cast<int32_t>(expected[3])});
  const auto end = std::find(expected.begin(), expected.end(), expected[3]);
  CHECK(drain(session) == Ids(expected.begin(), end));
  CHECK(session.finish_reason() == FinishReason::eos);
  session.rewind(kPrompt.size());
  session.start(kGreedy, 8, std::vector<int32_t>{});
  CHECK(drain(session) == expected);
}

TEST_CASE("session: logits in the middle of a generation") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {.chunk = 4});
  session.append(kPrompt);
  session.start(kGreedy, 0);
  drain(session, 3);
  const Ids tokens = tokens_of(session);
  CHECK(session.pending() == 1);
  CHECK(pending_logits(session) == expected_logits(model, tokens, tokens.size() - 1));
  CHECK(drain(session, 2) == model.greedy(tokens, 2));
}

TEST_CASE("session: logits from any position on are the last ones of all, and no others are asked for") {
  for (const Kind kind : {Kind::dense, Kind::two_stages}) {
    const FakeModel model(kind);
    const std::vector<float> expected = expected_logits(model, kPrompt);
    for (const size_t chunk : {1U, 3U, 4U, 256U}) {
      for (size_t first = 0; first <= kPrompt.size(); ++first) {
        CAPTURE(chunk);
        CAPTURE(first);
        Session session(model.engine, {.chunk = chunk});
        session.append(kPrompt);
        std::vector<float> out((kPrompt.size() - first) * FakeModel::kVocab + 1, -1.0F);
        session.logits(first, out.data());
        CHECK(out.back() == -1.0F);  // nothing beyond
        out.pop_back();
        CHECK(out == std::vector<float>(expected.begin() + static_cast<std::ptrdiff_t>(first * FakeModel::kVocab),
                                        expected.end()));
        session.start(kGreedy, 2);
        CHECK(drain(session) == model.greedy(kPrompt, 2));
      }
    }
    Session session(model.engine, {});
    session.append(kPrompt);
    session.compute();
    session.append(Ids{1, 2});
    for (const size_t wrong : {size_t{0}, kPrompt.size() - 1, kPrompt.size() + 3}) {
      check_names(error_of<std::invalid_argument>([&] { session.logits(wrong, nullptr); }), "10 to 12");
    }
  }
}

TEST_CASE("session: a prompt ends a running generation; a new one has the room that is left") {
  const FakeModel model(Kind::two_stages);
  for (const size_t filler : {1U, 3U, 4U}) {  // of four tokens of room
    Session session(model.engine, {.context = 16});
    session.append(kPrompt);
    session.start(kGreedy, 0);
    drain(session, 2);
    session.append(Ids(filler, 8));
    const Ids tokens = tokens_of(session);
    CHECK_THROWS_AS(session.next(), std::invalid_argument);
    CHECK(tokens_of(session) == tokens);
    session.start(kGreedy, 0);
    CHECK(drain(session) == model.greedy(tokens, 4 - filler));
    CHECK(session.finish_reason() == FinishReason::context);
    CHECK(session.tokens().size() == session.context());
  }
}

TEST_CASE("session: after a rewind the rest is as if it had never been") {
  const FakeModel model(Kind::two_stages);
  const Ids all = concat(kPrompt, model.greedy(kPrompt, 6));
  for (size_t length = 0; length <= all.size(); ++length) {
    CAPTURE(length);
    Session session(model.engine, {.chunk = 4});
    session.append(kPrompt);
    session.start(kGreedy, 6);
    drain(session);
    session.rewind(length);
    const Ids kept(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(length));
    CHECK(tokens_of(session) == kept);
    if (length < all.size()) CHECK_THROWS_AS(session.next(), std::invalid_argument);  // the generation is gone
    if (length == 0) {
      CHECK_THROWS_AS(session.start(kGreedy, 1), std::invalid_argument);
    } else {
      session.start(kGreedy, 3);
      CHECK(drain(session) == model.greedy(kept, 3));
      session.rewind(length);
    }
    session.append(Ids{20, 21});
    const Ids branch = concat(kept, {20, 21});
    const size_t pending = session.pending();
    CHECK(pending >= 2);
    CHECK(pending_logits(session) == expected_logits(model, branch, branch.size() - pending));
  }
}

TEST_CASE("session: a rewind beyond the sequence is refused, and changes nothing") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {});
  session.append(kPrompt);
  const std::string message = error_of<std::invalid_argument>([&] { session.rewind(11); });
  check_names(message, "11");
  check_names(message, "10");
  CHECK(tokens_of(session) == kPrompt);
  CHECK(pending_logits(session) == expected_logits(model, kPrompt));
}

TEST_CASE("session: a generation ends at the context, the length or the end token") {
  const Ids free_run = FakeModel(Kind::two_stages).greedy(kPrompt, 12);
  size_t eos_at = 3;  // the first from here on that is new
  while (std::ranges::count(std::span(free_run).first(eos_at), free_run.at(eos_at)) > 0) ++eos_at;
  const int64_t eos = free_run[eos_at];
  const FakeModel model(Kind::two_stages, {static_cast<int32_t>(eos)});
  Session session(model.engine, {.context = kPrompt.size() + eos_at + 1});
  session.append(kPrompt);

  session.start(kGreedy, 2);
  CHECK(drain(session) == Ids{free_run[0], free_run[1]});
  CHECK(session.finish_reason() == FinishReason::length);

  session.start(kGreedy, 0);
  CHECK(drain(session).size() == eos_at - 2);
  CHECK(session.finish_reason() == FinishReason::eos);
  CHECK_FALSE(session.next());
  Ids tokens = concat(kPrompt, Ids(free_run.begin(), free_run.begin() + static_cast<std::ptrdiff_t>(eos_at)));
  CHECK(tokens_of(session) == tokens);  // without the end token

  // One token of room is left; what ends the text again is a prompt's business.
  session.rewind(tokens.size() - 1);
  session.append(Ids{1});
  tokens.back() = 1;
  session.start(kGreedy, 100);
  const Ids last = model.greedy(tokens, 1);
  REQUIRE(last[0] != eos);
  CHECK(drain(session) == last);
  CHECK(session.finish_reason() == FinishReason::context);
  CHECK(session.tokens().size() == session.context());
  session.start(kGreedy, 1);
  CHECK_FALSE(session.next());
  CHECK(session.finish_reason() == FinishReason::context);
}

TEST_CASE("session: a prompt that does not fit or is not of the vocabulary leaves everything as it was") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {.context = 12});
  session.append(kPrompt);
  session.start(kGreedy, 0);
  drain(session, 1);
  const Ids tokens = tokens_of(session);
  const std::string message = error_of<std::invalid_argument>([&] { session.append(Ids{1, 2}); });
  check_names(message, "13");
  check_names(message, "12");
  for (const int64_t wrong : {int64_t{-1}, int64_t{37}, int64_t{1} << 32, std::numeric_limits<int64_t>::min()}) {
    check_names(error_of<std::invalid_argument>([&] { session.append(Ids{1, wrong}); }), std::to_string(wrong));
  }
  session.append({});  // no token, no change
  CHECK(tokens_of(session) == tokens);
  CHECK(drain(session) == model.greedy(tokens, 1));
  CHECK(session.finish_reason() == FinishReason::context);
}

TEST_CASE("session: options and calls outside their limits are refused") {
  const FakeModel model(Kind::two_stages);
  const std::string message =
      error_of<std::invalid_argument>([&] { Session(model.engine, {.context = FakeModel::kContext + 1}); });
  check_names(message, "49");
  check_names(message, "48");
  check_names(error_of<std::invalid_argument>([&] { Session(model.engine, {.chunk = 0}); }), "chunk");
  Session session(model.engine, {});
  CHECK(session.context() == FakeModel::kContext);  // the model's own is below the default
  CHECK_THROWS_AS(session.start(kGreedy, 1), std::invalid_argument);
  CHECK_THROWS_AS(session.next(), std::invalid_argument);
  session.append(kPrompt);
  CHECK_THROWS_AS(session.start({.temperature = -1}, 1), std::invalid_argument);
  session.start(kGreedy, 2);
  CHECK(drain(session) == model.greedy(kPrompt, 2));
}

TEST_CASE("session: the KV cache has the default size, the given one, or an error names what it needs") {
  Manifest manifest;
  manifest.architecture = FakeModel(Kind::dense).engine->manifest().architecture;
  manifest.architecture.layers = 2;
  manifest.architecture.kv_caches.resize(2);
  manifest.architecture.context = 0x7FFFFFFF;
  manifest.stages = {{"stage", std::nullopt}};
  const GraphLoader load = [](const std::filesystem::path&) {
    const std::vector<std::string> inputs = {"token_ids", "total_sequence_length", "past.0", "past.1", "logit_index"};
    return std::make_unique<FakeGraph>(inputs, std::vector<std::string>{"present.0", "present.1", "logits"});
  };
  const auto engine = [&] { return engine_of(manifest, KvType::float32, load); };
  CHECK(Session(engine(), {}).context() == SessionOptions::kDefaultContext);
  CHECK(Session(engine(), {.context = 5000}).context() == 5000);
  // 2^56 bytes, more than any address space; and 2^64, which wraps around 64 bits.
  for (const uint32_t heads : {1U << 12, 1U << 20}) {
    manifest.architecture.kv_caches.assign(2, {.kv_heads = heads, .head_dim = 512});
    check_names(error_of<std::runtime_error>([&] { Session(engine(), {.context = 0x7FFFFFFF}); }), "2147483647");
  }
}

// A graph that computes nothing and shows the memory that it was bound to.
class Window final : public Graph {
 public:
  using Memory = std::map<std::string, Tensor>;

  explicit Window(Memory& memory) : memory_(memory) {}
  const std::vector<std::string>& inputs() const override { return inputs_; }
  const std::vector<std::string>& outputs() const override { return outputs_; }
  std::unique_ptr<Binding> bind(const std::vector<Tensor>& inputs, const std::vector<Tensor>&) const override {
    struct Nothing final : Binding {
      void run() override {}
    };
    for (const Tensor& tensor : inputs) memory_[tensor.name] = tensor;
    return std::make_unique<Nothing>();
  }

 private:
  Memory& memory_;
  std::vector<std::string> inputs_ = {"token_ids", "total_sequence_length", "past.0", "past.1", "logit_index"};
  std::vector<std::string> outputs_ = {"present.0", "present.1", "logits"};
};

constexpr KvType kKvTypes[] = {KvType::float32, KvType::float16, KvType::int8, KvType::int4};

// A dense engine of two such layers, with 3 kv heads of 32 elements.
std::shared_ptr<const Engine> window_engine(KvType type, Window::Memory& memory) {
  Manifest manifest;
  manifest.architecture = {
      .vocab_size = 1000, .layers = 2, .hidden = 4, .context = 1000, .kv_caches = {2, {.kv_heads = 3, .head_dim = 32}}};
  manifest.stages = {{"stage", std::nullopt}};
  return engine_of(manifest, type,
                   [&memory](const std::filesystem::path&) { return std::make_unique<Window>(memory); });
}

TEST_CASE("session: bytes of the KV cache that a step reads, of every type") {
  Window::Memory memory;
  for (const KvType type : kKvTypes) {
    const auto engine = window_engine(type, memory);
    const Session session(engine, {});
    // Of one position of one head, keys and values: 32 elements each, and their scales (kernels/kv_cache.h).
    const std::map<KvType, size_t> bytes = {{KvType::float32, 2 * 32 * 4},
                                            {KvType::float16, 2 * 32 * 2},
                                            {KvType::int8, 2 * (32 + 4)},
                                            {KvType::int4, 2 * (32 / 2 + 2)}};
    for (const size_t tokens : {0U, 1U, 63U, 64U, 65U, 128U, 1000U}) {
      CAPTURE(tokens);
      const size_t read = (tokens + 63) / 64 * 64;  // whole blocks of positions
      CHECK(session.kv_bytes(tokens) == 2 * 3 * read * bytes.at(type));
    }
  }
}

TEST_CASE("session: synthetic tokens fill their positions of every layer and head with noise, and no others") {
  constexpr size_t kFirst = 70;  // two fills: the second begins within a block
  constexpr size_t kTokens = 150;
  constexpr size_t kDim = 32;
  Window::Memory memory;
  for (const KvType type : kKvTypes) {
    Session session(window_engine(type, memory), {});
    session.fill_synthetic(kFirst);
    session.fill_synthetic(kTokens - kFirst);
    CHECK(session.pending() == 0);
    CHECK(std::all_of(session.tokens().begin(), session.tokens().end(), [](int id) { return id >= 0 && id < 1000; }));
    CHECK(std::set(session.tokens().begin(), session.tokens().end()).size() > kTokens / 2);
    for (const char* layer : {"past.0", "past.1"}) {
      const Tensor& cache = memory.at(layer);
      const auto* const bytes = static_cast<const uint8_t*>(cache.data);
      const std::ptrdiff_t block_bytes = cache.shape[2];
      const std::ptrdiff_t all = static_cast<std::ptrdiff_t>(cache.shape[0]) * cache.shape[1];
      for (std::ptrdiff_t index = 0; index < all; ++index) {  // runs of 8 blocks, a head's
        const bool used = index / 8 < 3 && index % 8 * 64 < static_cast<std::ptrdiff_t>(kTokens);
        const uint8_t* const block = bytes + index * block_bytes;
        const std::ptrdiff_t zeros = std::count(block, block + block_bytes, uint8_t{0});
        if (!used) CHECK(zeros == block_bytes);
        if (used && index % 8 * 64 + 64 <= static_cast<std::ptrdiff_t>(kTokens)) CHECK(zeros < block_bytes / 2);
      }
      if (type != KvType::float32) continue;
      double sum = 0;
      double squares = 0;
      size_t wrong = 0;
      for (size_t block = 0; block < 3; ++block) {
        for (size_t head = 0; head < 3; ++head) {
          const float* const keys = static_cast<const float*>(cache.data) + (head * 8 + block) * 2 * 64 * kDim;
          for (size_t e = 0; e < kDim; ++e) {
            for (size_t slot = 0; slot < 64; ++slot) {
              const float key = keys[e * 64 + slot];
              const float value = keys[64 * kDim + slot * kDim + e];
              const bool filled = block * 64 + slot < kTokens;
              if ((key != 0) != filled || (value != 0) != filled) ++wrong;
              sum += double{key} + double{value};
              squares += double{key} * double{key} + double{value} * double{value};
            }
          }
        }
      }
      CHECK(wrong == 0);  // the normal distribution does not give 0 where a float32 has 2^24 steps below 1
      // 28,800 samples of a pool of 8,191: the standard error of both moments is about 0.01.
      constexpr double kCount = 2.0 * kTokens * 3 * kDim;
      CHECK(std::abs(sum / kCount) < 0.1);
      CHECK(std::abs(squares / kCount - 1) < 0.1);
    }
  }
}

TEST_CASE("session: generation goes on behind synthetic tokens, which cost neither steps nor rows") {
  for (const Kind kind : {Kind::dense, Kind::two_stages, Kind::three_stages}) {
    const FakeModel model(kind);
    const auto generate = [](Session& session) {
      session.start(kGreedy, 6);
      return drain(session);
    };
    Session session(model.engine, {.chunk = 4});
    session.append(kPrompt);
    pending_logits(session);
    session.reset_stats();
    session.fill_synthetic(20);
    CHECK(session.tokens().size() == kPrompt.size() + 20);
    CHECK(session.pending() == 0);
    CHECK(session.stats().prefill_tokens == 0);
    CHECK(session.stats().rows.requests == 0);
    CHECK_THROWS_AS(session.next(), std::invalid_argument);  // no generation was started

    const Ids made = generate(session);
    CHECK(made.size() == 6);
    Stats stats = session.stats();
    CHECK(stats.prefill_tokens == 1);  // the last synthetic token is computed for its logits
    CHECK(stats.decode_tokens == 5);
    CHECK(stats.rows.requests == (kind == Kind::dense ? 0 : 6));
    CHECK(stats.stall_ns.size() == (kind == Kind::dense ? 0 : 5));

    session.rewind(kPrompt.size() + 20);
    CHECK(generate(session) == made);
    Session other(model.engine, {.prefetch = false});  // the same noise, and the same text from it
    other.append(kPrompt);
    pending_logits(other);
    other.fill_synthetic(20);
    CHECK(generate(other) == made);

    // A rewind into the synthetic tokens keeps those before.
    session.rewind(kPrompt.size() + 5);
    session.append(Ids{1, 2, 3});
    CHECK(session.pending() == 3);
    CHECK(pending_logits(session).size() == 3 * FakeModel::kVocab);
  }
}

TEST_CASE("session: synthetic tokens beyond the context or behind pending ones are refused, and change nothing") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {.context = 16});
  session.append(kPrompt);
  check_names(error_of<std::invalid_argument>([&] { session.fill_synthetic(1); }), "pending");
  session.start(kGreedy, 2);
  const Ids made = drain(session);
  CHECK_THROWS_AS(session.fill_synthetic(1), std::invalid_argument);  // the last generated token is pending
  pending_logits(session);
  for (const size_t count : {size_t{5}, std::numeric_limits<size_t>::max()}) {
    const std::string message = error_of<std::invalid_argument>([&] { session.fill_synthetic(count); });
    check_names(message, std::to_string(12 + count));
    check_names(message, "16");
  }
  CHECK(tokens_of(session) == concat(kPrompt, made));
  session.start(kGreedy, 1);
  CHECK(drain(session) == model.greedy(concat(kPrompt, made), 1));
  session.rewind(12);
  session.start(kGreedy, 1);
  drain(session);
  session.rewind(12);
  session.fill_synthetic(4);
  CHECK(session.tokens().size() == session.context());
}

TEST_CASE("session: time of sampling is a part of decode's, and of decode's alone") {
  const FakeModel model(Kind::two_stages);
  Session session(model.engine, {});
  session.append(kPrompt);
  session.start(kGreedy, 10);
  session.next();  // from the prompt: prefill
  CHECK(session.stats().sample_ns == 0);
  drain(session);
  const Stats stats = session.stats();
  CHECK(stats.sample_ns > 0);
  CHECK(stats.sample_ns <= stats.decode_ns);
  session.reset_stats();
  CHECK(session.stats().sample_ns == 0);
}

}  // namespace
}  // namespace meki
