#include "tests/cpp/kernels/attention_reference.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace meki::test {
namespace {

constexpr size_t kBlock = 64;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

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

}  // namespace

Sequence::Sequence(const Shape& shape_, KvType type, Random& random)
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
void Sequence::add_offsets(Random& random) {
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

std::vector<float> Sequence::run(const Simd& path, size_t first, size_t last, size_t chunk, const Parallel& parallel) {
  const size_t row = shape.heads() * shape.head_dim;
  std::vector<float> out((last - first) * row + 1, kNaN);
  for (size_t at = first; at < last; at += chunk) {
    attention(path, layout, args(at, std::min(chunk, last - at), out.data() + (at - first) * row), parallel);
  }
  CHECK(std::isnan(out.back()));
  out.pop_back();
  return out;
}

AttentionArgs Sequence::args(size_t past, size_t tokens, float* out) {
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

}  // namespace meki::test
