// runtime/kernels/attention, for every path that this CPU runs, against a naive attention in double precision.

#include "runtime/kernels/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "tests/cpp/allocations.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::Bytes;
using test::Errors;
using test::kKvTypes;
using test::kRounding;
using test::Random;
using test::Stored;
using test::stored_key;
using test::stored_value;
using test::Threads;

constexpr size_t kBlock = 64;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  size_t kv_heads;
  size_t group;  // query heads of a kv head
  size_t head_dim;
  size_t past;
  size_t tokens;
  bool norm = false;
  bool offsets = false;  // of the keys
  size_t window = 0;
  bool value_norm = false;
  float scale = 0;  // 0: 1 / sqrt(head_dim)

  size_t heads() const { return kv_heads * group; }
  size_t width() const { return (heads() + 2 * kv_heads) * head_dim; }
  size_t total() const { return past + tokens; }
  float factor() const { return scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(head_dim)); }
};

// A sequence, and the cache that a session would keep for it.
class Sequence {
 public:
  Sequence(const Shape& shape_, KvType type, Random& random)
      : shape(shape_),
        layout(type, shape.kv_heads, shape.head_dim),
        qkv(random.floats(shape.total() * shape.width(), -2, 2)),
        q_norm_weight(random.floats(shape.head_dim, 0.5F, 1.5F)),
        k_norm_weight(random.floats(shape.head_dim, 0.5F, 1.5F)),
        offsets(shape.kv_heads * shape.head_dim),
        // Finite in every type, and not 0: nobody may look at what was not stored.
        cache(KvLayout::blocks_for(shape.total()) * shape.kv_heads * layout.block_bytes(), std::byte{0x55}) {
    for (size_t position = 0; position < shape.total(); ++position) {
      for (size_t i = 0; i < shape.head_dim / 2; ++i) {
        const double angle = static_cast<double>(position) *
                             std::pow(1000.0, -2.0 * static_cast<double>(i) / static_cast<double>(shape.head_dim));
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    if (shape.offsets) add_offsets(random);
  }

  // To three channels of every key, twenty times as large as all else.
  void add_offsets(Random& random) {
    for (size_t head = 0; head < shape.kv_heads; ++head) {
      float* const offset = offsets.data() + head * shape.head_dim;
      for (const size_t channel : {size_t{1}, shape.head_dim / 2 + 1, shape.head_dim - 2 - head % 2}) {
        offset[channel] = random.floats(1, 20, 40)[0] * (channel % 3 == 0 ? -1.0F : 1.0F);
      }
      for (size_t position = 0; position < shape.total(); ++position) {
        float* const key = qkv.data() + position * shape.width() + (shape.heads() + head) * shape.head_dim;
        for (size_t e = 0; e < shape.head_dim; ++e) key[e] += offset[e];
      }
    }
    kept_apart.emplace(offsets.data(), layout, cos.data(), sin.data(), shape.total());
  }

  // Runs tokens first .. last - 1 in steps of at most `chunk`; returns float32 [last - first, heads * head_dim].
  std::vector<float> run(const Simd& path, size_t first, size_t last, size_t chunk, const Parallel& parallel) {
    const size_t row = shape.heads() * shape.head_dim;
    std::vector<float> out((last - first) * row + 1, kNaN);
    for (size_t at = first; at < last; at += chunk) {
      attention(path, layout, args(at, std::min(chunk, last - at), out.data() + (at - first) * row), parallel);
    }
    CHECK(std::isnan(out.back()));
    out.pop_back();
    return out;
  }
  AttentionArgs args(size_t past, size_t tokens, float* out) {
    AttentionArgs args;
    args.heads = shape.heads();
    args.tokens = tokens;
    args.past = past;
    args.qkv = qkv.data() + past * shape.width();
    args.cos = cos.data() + past * shape.head_dim / 2;
    args.sin = sin.data() + past * shape.head_dim / 2;
    args.q_norm_weight = shape.norm ? q_norm_weight.data() : nullptr;
    args.k_norm_weight = shape.norm ? k_norm_weight.data() : nullptr;
    args.value_norm = shape.value_norm;
    args.epsilon = 1e-5F;
    args.scale = shape.factor();
    args.offsets = kept_apart ? &*kept_apart : nullptr;
    args.window = shape.window;
    args.cache = cache.data();
    args.cache_blocks = cache.size() / layout.kv_heads / layout.block_bytes();
    args.out = out;
    return args;
  }

  Shape shape;
  KvLayout layout;
  std::vector<float> qkv;  // [total, width]
  std::vector<float> q_norm_weight;
  std::vector<float> k_norm_weight;
  std::vector<float> offsets;  // [kv_heads, head_dim]
  std::optional<KeyOffsets> kept_apart;
  std::vector<float> cos;  // [total, head_dim / 2]
  std::vector<float> sin;
  Bytes cache;
};

using Vector = std::vector<double>;

double norm_of(const Vector& vector) {
  double squares = 0;
  for (const double x : vector) squares += x * x;
  return std::sqrt(squares);
}

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// H x / sqrt(n), for runs of n = the largest power of two that divides the size: element (i, j) of H is -1 to the
// number of bits that i and j have in common (Sylvester's construction).
Vector hadamard(const Vector& x) {
  size_t run = 1;
  while (x.size() % (2 * run) == 0) run *= 2;
  Vector out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = i / run * run; j < (i / run + 1) * run; ++j) {
      out[i] += (std::popcount(i % run & j % run) % 2 == 0 ? x[j] : -x[j]) / std::sqrt(static_cast<double>(run));
    }
  }
  return out;
}

// A query or key as it takes part in the products: QK-norm, RoPE, and the Hadamard matrix for integers.
Vector prepared(const Sequence& s, size_t position, const float* in, const std::vector<float>& norm_weight) {
  const size_t dim = s.shape.head_dim;
  Vector x(in, in + dim);
  if (s.shape.norm) {
    const double mean = dot(x, x) / static_cast<double>(dim);
    for (size_t e = 0; e < dim; ++e) x[e] *= norm_weight[e] / std::sqrt(mean + 1e-5F);
  }
  Vector out(dim);
  for (size_t e = 0; e < dim / 2; ++e) {
    const double c = s.cos[position * (dim / 2) + e];
    const double d = s.sin[position * (dim / 2) + e];
    out[e] = x[e] * c - x[dim / 2 + e] * d;
    out[dim / 2 + e] = x[dim / 2 + e] * c + x[e] * d;
  }
  return s.layout.type == KvType::int8 || s.layout.type == KvType::int4 ? hadamard(out) : out;
}

struct Expected {
  Vector out;  // [tokens, heads * head_dim]
  Vector bounds;
};

// Attention over all positions of the sequence for the tokens from `past` on. float32 takes keys from qkv, the others
// what the cache has for them, as values do; all that is in the cache is compared with what should be.
class Naive {
 public:
  explicit Naive(const Sequence& sequence) : s_(sequence) {
    for (size_t h = 0; h < s_.shape.kv_heads; ++h) {
      for (size_t p = 0; p < s_.shape.total(); ++p) read(h, p);
    }
    CHECK(stored_.worst() <= 1);
  }

  Expected attend() const {
    const Shape& shape = s_.shape;
    Expected expected;
    for (size_t t = 0; t < shape.tokens; ++t) {
      for (size_t h = 0; h < shape.heads(); ++h) {
        const float* const query = s_.qkv.data() + (shape.past + t) * shape.width() + h * shape.head_dim;
        head(h / shape.group, shape.past + t, prepared(s_, shape.past + t, query, s_.q_norm_weight), expected);
      }
    }
    return expected;
  }

 private:
  bool integer() const { return s_.layout.type == KvType::int8 || s_.layout.type == KvType::int4; }

  void read(size_t kv_head, size_t position) {
    const Shape& shape = s_.shape;
    const size_t dim = shape.head_dim;
    const KvType type = s_.layout.type;
    const float* const key = s_.qkv.data() + position * shape.width() + (shape.heads() + kv_head) * dim;
    const float* const value = key + shape.kv_heads * dim;
    const std::byte* const block = s_.cache.data() + s_.layout.block_offset(kv_head, position);
    const float* const offset = s_.offsets.data() + kv_head * dim;
    std::vector<float> apart(key, key + dim);
    for (size_t e = 0; e < dim; ++e) apart[e] -= offset[e];
    const Vector k = prepared(s_, position, apart.data(), s_.k_norm_weight);
    Vector v(value, value + dim);
    if (s_.shape.value_norm) {
      const double mean = dot(v, v) / static_cast<double>(dim);
      for (double& x : v) x /= std::sqrt(mean + 1e-5F);
    }
    Vector stored_k(dim);
    Vector stored_v(dim);
    std::vector<Stored> elements;
    for (size_t e = 0; e < dim; ++e) {
      elements.push_back(stored_value(type, dim, block, position % kBlock, e));
      stored_k[e] = stored_key(type, dim, block, position % kBlock, e).value();
      stored_v[e] = elements[e].value();
    }
    // Precision of the type, in parts of the largest magnitude of what shares a scale (kv_cache_test is exact about
    // it), and what norm, RoPE and Hadamard round in float32.
    const auto compare = [&](const Vector& stored, const Vector& exact, double part, double roundings) {
      for (size_t e = 0; e < dim; ++e) {
        const size_t group = type == KvType::int8 ? dim : type == KvType::int4 ? 32 : 1;
        double largest = 0;
        for (size_t i = e / group * group; i < (e / group + 1) * group; ++i)
          largest = std::max(largest, std::fabs(exact[i]));
        stored_.add(stored[e], exact[e], part * largest + roundings * kRounding * norm_of(exact));
      }
    };
    const double parts[] = {0, 0x1p-11, 0.501 / 127, 0};
    const double part = parts[static_cast<size_t>(type)];
    compare(stored_k, k, type == KvType::int4 ? 1.01 / 8 : part, roundings());
    compare(stored_v, v, type == KvType::int4 ? 0.501 / 7 : part, s_.shape.value_norm ? roundings() : 1e-30);
    keys_.push_back(type == KvType::float32 ? k : stored_k);
    values_.push_back(elements);
    offsets_.push_back(s_.shape.offsets ? prepared(s_, position, offset, {}) : Vector(dim));
  }

  // Of one element, in parts of the vector's norm: the mean of squares, the quotient, the weight, and RoPE's three;
  // Hadamard adds one a level.
  double roundings() const { return static_cast<double>(s_.shape.head_dim) / 2 + 20; }

  void head(size_t kv_head, size_t position, Vector query, Expected& expected) const {
    const Shape& shape = s_.shape;
    const size_t dim = shape.head_dim;
    double largest_query = 0;
    for (double& q : query) q *= shape.factor();
    for (const double q : query) largest_query = std::max(largest_query, std::fabs(q));

    Vector weights;
    double score_error = 0;
    for (size_t p = 0; p <= position; ++p) {
      if (shape.window > 0 && p + shape.window <= position) {
        weights.push_back(-std::numeric_limits<double>::infinity());
        continue;
      }
      const Vector& key = keys_[kv_head * shape.total() + p];
      const Vector& offset = offsets_[kv_head * shape.total() + p];
      weights.push_back(dot(query, key) + dot(query, offset));
      // Rounding of a query's and key's elements, then of products and sums; integers: half a unit of the query's 8
      // bits (a little more for its own roundings).
      double error = (2 * roundings() + static_cast<double>(dim)) * kRounding * 2 * norm_of(query) * norm_of(key);
      // The rotary tables' own rounding, in both angles that make one; products and sums.
      error += (2 * roundings() + 32) * kRounding * norm_of(query) * norm_of(offset);
      double codes = 0;
      for (const double k : key) codes += std::fabs(k);
      if (integer()) error += 0.501 * largest_query / 127 * codes;
      score_error = std::max(score_error, error);
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (double& weight : weights) weight /= sum;

    for (size_t e = 0; e < dim; ++e) {
      double exact = 0;
      double magnitude = 0;
      for (size_t p = 0; p <= position; ++p) {
        const double value = values_[kv_head * shape.total() + p][e].value();
        exact += weights[p] * value;
        magnitude += weights[p] * std::fabs(value);
      }
      // Scores that are off by d change a weight, and its part of the sum, by factors of at most e^d each. Differences
      // of scores (below 64 here), exponentials, products and sums are rounded.
      const double rounding = (static_cast<double>(position) + 200) * kRounding;
      const double bound = (std::expm1(2 * score_error) + rounding) * magnitude;
      expected.out.push_back(exact);
      expected.bounds.push_back(bound + (integer() ? weight_rounding(kv_head, position, e, weights) : 0));
    }
  }

  // Integer types round weight * value scale to 8 bits of a block's largest.
  double weight_rounding(size_t kv_head, size_t position, size_t e, const Vector& weights) const {
    double bound = 0;
    for (size_t first = 0; first <= position; first += kBlock) {
      double largest = 0;
      double codes = 0;
      for (size_t p = first; p < std::min(first + kBlock, position + 1); ++p) {
        const Stored& stored = values_[kv_head * s_.shape.total() + p][e];
        largest = std::max(largest, weights[p] * stored.scale);
        codes += std::fabs(stored.code);
      }
      bound += 0.51 * largest / 255 * codes;  // half a unit, and what the weights are off themselves
    }
    return bound;
  }

  const Sequence& s_;
  std::vector<Vector> keys_;                 // [kv_heads, total]
  std::vector<Vector> offsets_;              // [kv_heads, total]
  std::vector<std::vector<Stored>> values_;  // [kv_heads, total]
  Errors stored_;
};

// All paths, with one and four threads, in one step and token by token.
void check(const Shape& shape, KvType type, Random& random) {
  CAPTURE(name_of(type));
  CAPTURE(shape.kv_heads);
  CAPTURE(shape.group);
  CAPTURE(shape.head_dim);
  CAPTURE(shape.past);
  CAPTURE(shape.tokens);
  CAPTURE(shape.norm);
  CAPTURE(shape.offsets);
  CAPTURE(shape.window);
  Sequence sequence(shape, type, random);
  sequence.run(simd(), 0, shape.total(), shape.total(), {});
  const Bytes cache = sequence.cache;
  const Expected expected = Naive(sequence).attend();
  const auto compare = [&](const std::vector<float>& got) {
    Errors errors;
    for (size_t i = 0; i < got.size(); ++i) errors.add(got[i], expected.out[i], expected.bounds[i]);
    CHECK(errors.worst() <= 1);
    // Every path, and every way to cut the work, appends the same bytes; appending over old positions leaves them.
    CHECK(sequence.cache == cache);
  };
  for (const Simd* path : simd_paths()) {
    CAPTURE(path->name);
    Threads threads(4, path != &simd());  // threads take their time to start: one path will do
    const std::vector<float> one = sequence.run(*path, shape.past, shape.total(), shape.tokens, {});
    compare(one);
    CHECK(sequence.run(*path, shape.past, shape.total(), shape.tokens, threads.parallel()) == one);
    // What is computed beside a token, and by whom, changes nothing.
    CHECK(sequence.run(*path, shape.past, shape.total(), 1, {}) == one);
    CHECK(sequence.run(*path, shape.past, shape.total(), 1 + shape.tokens / 3, threads.parallel()) == one);
  }
}

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
