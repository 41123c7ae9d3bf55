// runtime/kernels/attention, for every path that this CPU runs, against a naive attention in double precision.

#include "runtime/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/cpp/allocations.h"
#include "tests/cpp/kernels/attention_reference.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::Bytes;
using test::check;
using test::kKvTypes;
using test::Random;
using test::Sequence;
using test::Shape;
using test::Threads;

constexpr size_t kBlock = 64;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TEST_CASE("attention: edges of blocks") {
  Random random(21);
  for (const KvType type : kKvTypes) {
    for (const size_t past : {0, 1, 62, 63, 64, 65, 127, 128}) {
      for (const size_t tokens : {1, 2, 3}) check({1, 2, 32, past, tokens, true}, type, random);
    }
    for (const size_t tokens : {31, 32, 33, 63, 64, 65}) check({1, 1, 32, 0, tokens}, type, random);
  }
}

TEST_CASE("attention: random shapes") {
  Random random(22);
  for (const KvType type : kKvTypes) {
    for (int i = 0; i < 5; ++i) {
      const size_t groups[] = {1, 2, 4, 7};
      const size_t dims[] = {32, 64, 96, 16, 48, 80};
      Shape shape{1 + random.below(3), groups[random.below(4)], dims[random.below(type == KvType::int4 ? 3 : 6)],
                  random.below(201),   1 + random.below(70),    random.below(2) == 0};
      if (shape.heads() > 4) shape.tokens = 1 + shape.tokens / 4;
      check(shape, type, random);
    }
    check({1, 1, type == KvType::int4 ? size_t{256} : size_t{128}, 600, 2, true}, type, random);
  }
}

TEST_CASE("attention: offsets of keys are kept apart") {
  Random random(26);
  for (const KvType type : kKvTypes) {
    check({1, 1, 32, 0, 1, false, true}, type, random);
    check({2, 3, 64, 61, 9, false, true}, type, random);
    check({1, 2, 96, 200, 2, false, true}, type, random);
  }
}

TEST_CASE("attention: over a window, with normed values and a scale") {
  Random random(27);
  for (const KvType type : kKvTypes) {
    for (const size_t window : {1, 2, 63, 64, 65, 100, 1000}) {
      check({.kv_heads = 1, .group = 2, .head_dim = 32, .past = 190, .tokens = 5, .norm = true, .window = window}, type,
            random);
    }
    check({.kv_heads = 2,
           .group = 1,
           .head_dim = 64,
           .past = 0,
           .tokens = 140,
           .window = 20,
           .value_norm = true,
           .scale = 0.3F},
          type, random);
    // As many splits as a long cache has, and several tiles.
    check({.kv_heads = 1, .group = 4, .head_dim = 32, .past = 500, .tokens = 12, .window = 333, .value_norm = true},
          type, random);
  }
}

TEST_CASE("attention: a ring of blocks is as good as a whole cache") {
  Random random(28);
  for (const KvType type : kKvTypes) {
    CAPTURE(name_of(type));
    for (const size_t chunk : {1, 7, 64, 100}) {
      CAPTURE(chunk);
      Sequence sequence({.kv_heads = 2, .group = 2, .head_dim = 32, .past = 0, .tokens = 400, .window = 90}, type,
                        random);
      const std::vector<float> whole = sequence.run(simd(), 0, 400, chunk, {});
      // What holds a window and a step, wherever in a block they begin.
      const size_t blocks = KvLayout::blocks_for(90 + chunk + kBlock);
      sequence.cache.assign(blocks * 2 * sequence.layout.block_bytes(), std::byte{0x55});
      CHECK(sequence.run(simd(), 0, 400, chunk, {}) == whole);
    }
  }
}

TEST_CASE("attention: over another layer's cache, of the last tokens alone") {
  Random random(29);
  for (const KvType type : kKvTypes) {
    CAPTURE(name_of(type));
    for (const size_t window : {size_t{0}, size_t{70}}) {
      Sequence sequence(
          {.kv_heads = 2, .group = 3, .head_dim = 32, .past = 120, .tokens = 9, .norm = true, .window = window}, type,
          random);
      const std::vector<float> out = sequence.run(simd(), 0, 129, 129, {});
      const Bytes cache = sequence.cache;
      const size_t row = sequence.shape.heads() * 32;
      for (const size_t tokens : {1, 9}) {
        std::vector<float> queries;
        for (size_t t = 129 - tokens; t < 129; ++t) {
          const float* const its = sequence.qkv.data() + t * sequence.shape.width();
          queries.insert(queries.end(), its, its + row);
        }
        std::vector<float> again(tokens * row);
        AttentionArgs args = sequence.args(129 - tokens, tokens, again.data());
        args.shared = true;
        args.qkv = queries.data();
        args.k_norm_weight = nullptr;
        attention(simd(), sequence.layout, args, {});
        CHECK(std::equal(again.begin(), again.end(), out.end() - static_cast<ptrdiff_t>(again.size())));
        CHECK(sequence.cache == cache);
      }
    }
  }
}

TEST_CASE("attention: rewinding a sequence leaves no trace") {
  Random random(23);
  for (const KvType type : kKvTypes) {
    CAPTURE(name_of(type));
    Sequence sequence({2, 2, 32, 60, 10}, type, random);
    const std::vector<float> right = sequence.run(simd(), 0, 70, 70, {});
    const Bytes cache = sequence.cache;
    const std::vector<float> qkv = sequence.qkv;
    for (float& x : sequence.qkv) x *= -3;
    sequence.run(simd(), 50, 70, 7, {});  // something else from position 50 on
    CHECK_FALSE(sequence.cache == cache);
    sequence.qkv = qkv;
    const std::vector<float> again = sequence.run(simd(), 50, 70, 1, {});
    CHECK(std::equal(again.begin(), again.end(), right.end() - static_cast<ptrdiff_t>(again.size())));
    CHECK(sequence.cache == cache);
  }
}

TEST_CASE("attention: a NaN key or query is a NaN in what sees it") {
  Random random(24);
  for (const KvType type : kKvTypes) {
    CAPTURE(name_of(type));
    for (const Simd* path : simd_paths()) {
      CAPTURE(path->name);
      for (const size_t wrong : {0, 5, 63, 64, 70}) {
        CAPTURE(wrong);
        for (const size_t count : {1, 4}) {
          const Shape shape{2, 2, 32, 0, 75};
          Sequence sequence(shape, type, random);
          Threads threads(count, true);
          // Key head 0: query heads 0 and 1.
          sequence.qkv[wrong * shape.width() + shape.heads() * shape.head_dim + 3] = kNaN;
          const std::vector<float> out = sequence.run(*path, 0, 75, 75, threads.parallel());
          bool as_expected = true;
          for (size_t i = 0; i < out.size(); ++i) {
            const size_t token = i / (shape.heads() * shape.head_dim);
            const bool sees = token >= wrong && i / shape.head_dim % shape.heads() < 2;
            as_expected = as_expected && std::isnan(out[i]) == sees;
          }
          CHECK(as_expected);
        }
      }
      const Shape shape{1, 2, 32, 70, 3};
      Sequence sequence(shape, type, random);
      sequence.qkv[71 * shape.width() + 32 + 9] = kNaN;  // query head 1 of the second token
      const std::vector<float> out = sequence.run(*path, 0, 73, 73, {});
      bool as_expected = true;
      for (size_t i = 0; i < out.size(); ++i) as_expected = as_expected && std::isnan(out[i]) == (i / 32 == 71 * 2 + 1);
      CHECK(as_expected);
    }
  }
}

TEST_CASE("attention: allocates nothing after the first call" * doctest::skip(!test::kCountsAllocations)) {
  Random random(25);
  for (const KvType type : kKvTypes) {
    CAPTURE(name_of(type));
    Sequence sequence({2, 4, 64, 200, 40, true}, type, random);
    std::vector<float> out(240 * 8 * 64);
    Threads threads(4, true);
    const AttentionArgs steps[] = {sequence.args(0, 240, out.data()), sequence.args(200, 40, out.data()),
                                   sequence.args(239, 1, out.data())};
    attention(simd(), sequence.layout, steps[0], threads.parallel());
    const uint64_t before = test::allocations();
    for (const AttentionArgs& step : steps) {
      attention(simd(), sequence.layout, step, threads.parallel());
      attention(simd(), sequence.layout, step, {});
    }
    const uint64_t made = test::allocations() - before;
    CHECK(made == 0);
  }
}

TEST_CASE("attention: of several sequences at once it is that of each, to the bit") {
  Random random(77);
  for (const KvType type : kKvTypes) {
    for (const size_t window : {size_t{0}, size_t{90}}) {
      std::vector<Sequence> alone;
      std::vector<size_t> lengths = {1, 64, 900, 65, 3000, 200};  // with the step's own token
      for (const size_t length : lengths) {
        alone.emplace_back(
            Shape{.kv_heads = 3, .group = 3, .head_dim = 32, .past = length - 1, .tokens = 1, .window = window}, type,
            random);
        alone.back().run(simd(), 0, length - 1, 512, {});
      }
      std::vector<Sequence> together = alone;
      const size_t row = alone.front().shape.heads() * alone.front().shape.head_dim;
      std::vector<float> out(lengths.size() * row, kNaN);
      std::vector<AttentionArgs> all;
      for (size_t i = 0; i < lengths.size(); ++i)
        all.push_back(together[i].args(lengths[i] - 1, 1, out.data() + i * row));
      Threads threads(3);
      attention(simd(), together.front().layout, all, threads.parallel());
      for (size_t i = 0; i < lengths.size(); ++i) {
        const std::vector<float> expected = alone[i].run(simd(), lengths[i] - 1, lengths[i], 1, {});
        CHECK(std::equal(expected.begin(), expected.end(), out.data() + i * row));
        CHECK(together[i].cache == alone[i].cache);
      }
    }
  }
}

}  // namespace
}  // namespace meki
