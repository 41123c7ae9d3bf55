// runtime/executor/dynamic_state: keys and values and the inputs of convolutions, as one state of a sequence.

#include "runtime/executor/dynamic_state.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

#include "runtime/kernels/attention.h"
#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;

constexpr size_t kLayers = 3;
constexpr size_t kContext = 150;
constexpr size_t kTokenBytes = 10;  // of a convolution
const KvLayout kLayout(KvType::float16, 2, 16);
const std::vector<KvCacheInfo> kCaches(kLayers, {.kv_heads = 2, .head_dim = 16});

std::span<std::byte> bytes_of(const Tensor& tensor) {
  size_t bytes = 1;
  for (const int64_t size : tensor.shape) bytes *= static_cast<size_t>(size);
  return {static_cast<std::byte*>(tensor.data), bytes};
}

bool same(std::span<const std::byte> a, std::span<const std::byte> b) { return std::ranges::equal(a, b); }

struct State {
  explicit State(size_t convolutions_, uint32_t seed = 0)
      : convolutions(convolutions_),
        state({KvType::float16, kCaches, kContext, 8}, {convolutions, kTokenBytes, kContext}) {
    std::mt19937 random(seed);
    for (const std::span<std::byte> memory : all()) {
      for (std::byte& byte : memory) byte = seed == 0 ? std::byte{0} : static_cast<std::byte>(random());
    }
  }
  std::span<std::byte> kv_cache(size_t layer) const { return bytes_of(state.kv_cache().tensor("past", layer)); }
  std::span<std::byte> block(size_t layer, size_t head, size_t position) const {
    return kv_cache(layer).subspan(kLayout.block_offset(head, position), kLayout.block_bytes());
  }
  std::span<std::byte> convolution(size_t layer) const { return bytes_of(state.convolutions().tensor("past", layer)); }
  std::vector<std::span<std::byte>> all() const {
    std::vector<std::span<std::byte>> memory;
    for (size_t layer = 0; layer < kLayers; ++layer) memory.push_back(kv_cache(layer));
    for (size_t layer = 0; layer < convolutions; ++layer) memory.push_back(convolution(layer));
    return memory;
  }
  std::vector<std::byte> content() const {
    std::vector<std::byte> content;
    for (const std::span<std::byte> memory : all()) content.insert(content.end(), memory.begin(), memory.end());
    return content;
  }

  size_t convolutions;
  DynamicState state;
};

size_t snapshot_bytes(size_t convolutions, size_t tokens) {
  return kLayers * kLayout.bytes(tokens) + convolutions * tokens * kTokenBytes;
}

TEST_CASE("dynamic state: a convolution has room for every token of the context, in memory of its own") {
  const State state(2);
  const Tensor tensor = state.state.convolutions().tensor("past_convolution.1", 1);
  CHECK(tensor.name == "past_convolution.1");
  CHECK(tensor.type == ElementType::uint8);
  CHECK(tensor.shape == std::vector<int64_t>{kContext, kTokenBytes});
  CHECK(state.convolution(0).data() + kContext * kTokenBytes <= state.convolution(1).data());
  CHECK(state.state.convolutions().context() == kContext);
  CHECK(state.state.convolutions().bytes(7) == 2 * 7 * kTokenBytes);
}

TEST_CASE("dynamic state: it grows, and goes back to any length with what it has seen") {
  State state(2, 1);
  const std::vector<std::byte> content = state.content();
  CHECK(state.state.length() == 0);
  state.state.append(70);
  state.state.append(3);
  CHECK(state.state.length() == 73);
  CHECK(state.state.bytes(73) == kLayers * kLayout.bytes(73));
  for (const size_t length : {73, 64, 5, 0}) {
    state.state.truncate(length);
    CHECK(state.state.length() == length);
    CHECK(state.state.snapshot(length).size() == snapshot_bytes(2, length));
  }
  CHECK(state.content() == content);
  state.state.append_noise(20);
  CHECK(state.state.length() == 20);
}

TEST_CASE("dynamic state: a snapshot brings its tokens into another state, and nothing behind them") {
  for (const size_t convolutions : {0, 1, 2}) {
    for (const size_t length : {size_t{0}, size_t{1}, size_t{64}, size_t{77}, kContext}) {
      CAPTURE(convolutions);
      CAPTURE(length);
      State from(convolutions, 2);
      from.state.append(length);
      const std::vector<std::byte> snapshot = from.state.snapshot(length);
      CHECK(snapshot.size() == snapshot_bytes(convolutions, length));
      State to(convolutions, 3);
      const State before(convolutions, 3);
      to.state.append(99);
      to.state.restore(snapshot, length);
      CHECK(to.state.length() == length);
      for (size_t layer = 0; layer < kLayers; ++layer) {
        for (size_t position = 0; position < 512; position += 64) {
          const State& expected = position < length ? from : before;
          for (size_t head = 0; head < 2; ++head)
            CHECK(same(to.block(layer, head, position), expected.block(layer, head, position)));
        }
      }
      for (size_t layer = 0; layer < convolutions; ++layer) {
        const size_t used = length * kTokenBytes;
        CHECK(same(to.convolution(layer).first(used), from.convolution(layer).first(used)));
        CHECK(same(to.convolution(layer).subspan(used), before.convolution(layer).subspan(used)));
      }
      CHECK(to.state.snapshot(length) == snapshot);
    }
  }
}

TEST_CASE("dynamic state: a snapshot that does not fit is an error that names its size, and changes nothing") {
  constexpr size_t kLength = 70;
  for (const size_t convolutions : {0, 2}) {
    State state(convolutions, 4);
    state.state.append(33);
    const std::vector<std::byte> content = state.content();
    const size_t fits = snapshot_bytes(convolutions, kLength);
    const auto refuse = [&](size_t bytes, size_t length) {
      CAPTURE(bytes);
      CAPTURE(length);
      const std::vector<std::byte> snapshot(bytes);
      const std::string message = error_of<std::invalid_argument>([&] { state.state.restore(snapshot, length); });
      check_names(message, "of " + std::to_string(length) + " tokens has " + std::to_string(bytes) + " bytes");
      if (length <= kContext) {
        check_names(message, "expected " + std::to_string(snapshot_bytes(convolutions, length)));
      }
      CHECK(state.state.length() == 33);
      CHECK(state.content() == content);
    };
    for (const size_t bytes : {size_t{0}, size_t{1}, fits / 2, fits - 1, fits + 1, 2 * fits}) refuse(bytes, kLength);
    refuse(fits, 0);
    refuse(fits, kLength + 64);
    if (convolutions > 0) refuse(fits, kLength + 1);
    // Beyond the context, though the blocks of the KV cache have room for some more.
    for (const size_t length : {kContext + 1, kContext + 42}) refuse(snapshot_bytes(convolutions, length), length);
    for (const size_t length : {size_t{1} << 40, size_t{1} << 63, std::numeric_limits<size_t>::max()}) {
      refuse(fits, length);
      refuse(0, length);
    }
  }
}

// A layer over all positions, one over a window, and one that sees the cache of the second.
const std::vector<KvCacheInfo> kMixed = {{.kv_heads = 1, .head_dim = 32},
                                         {.kv_heads = 2, .head_dim = 16, .window = 100},
                                         {.kv_heads = 2, .head_dim = 16, .window = 100, .shared = 1}};
constexpr size_t kLong = 10'000;
constexpr size_t kChunk = 50;

// A state whose bytes tell which position was written last at their place.
struct Ring {
  BlockKvCache cache{KvType::int8, kMixed, kLong, kChunk};

  void step(size_t tokens) {
    cache.begin(tokens);
    for (size_t position = cache.length(); position < cache.length() + tokens; ++position)
      *at(position) = mark(position);
    cache.append(tokens);
  }
  void grow(size_t length) {
    while (cache.length() < length) step(std::min(kChunk, length - cache.length()));
  }
  std::byte* at(size_t position) {
    const Tensor tensor = cache.tensor("past.1", 1);
    const auto runs = static_cast<size_t>(tensor.shape[0] / 8);
    const auto heads = static_cast<size_t>(tensor.shape[1]);
    const auto bytes = static_cast<size_t>(tensor.shape[2]);                     // of a block
    const size_t block = position / 512 % runs * heads * 8 + position / 64 % 8;  // head 0's
    return static_cast<std::byte*>(tensor.data) + block * bytes + position % 64;
  }
  static std::byte mark(size_t position) { return static_cast<std::byte>(position * 37 + position / 64); }
  // Whether it has what the next token sees.
  bool sees_window() {
    for (size_t p = cache.length() < 100 ? 0 : cache.length() - 99; p < cache.length(); ++p) {
      if (*at(p) != mark(p)) return false;
    }
    return true;
  }
};

TEST_CASE("KV cache: a window takes a ring of blocks, and layers that share one have one memory") {
  const BlockKvCache cache(KvType::int8, kMixed, kLong, kChunk);
  CHECK(cache.tensor("past.0", 0).shape == std::vector<int64_t>{160, 1, 2 * 64 * (32 + 4)});
  const Tensor ring = cache.tensor("past.1", 1);
  CHECK(ring.shape == std::vector<int64_t>{24, 2, 2 * 64 * (16 + 4)});
  static_assert(24 * 64 >= 100 + 50 + 1024 + 63);  // neither end need be a block's
  CHECK(cache.tensor("shared.1", 2).data == ring.data);
  CHECK(BlockKvCache(KvType::int8, kMixed, 640, kChunk).tensor("past.1", 1).shape[0] == 16);
  const size_t full = 2 * 64 * (32 + 4);
  const size_t windowed = 2 * 2 * 2 * 64 * (16 + 4);  // for the two layers that read it
  CHECK(cache.bytes(64) == full + windowed);
  CHECK(cache.bytes(640) == 10 * full + 2 * windowed);
}

TEST_CASE("KV cache: a ring goes back as far as it has what the next token sees, and else to the beginning") {
  for (const size_t length : {size_t{1000}, size_t{3000}, size_t{5001}}) {
    for (size_t back = 0; back <= length; back += back < 1000 ? 111 : 7) {
      CAPTURE(length);
      CAPTURE(back);
      Ring ring;
      ring.grow(length);
      ring.cache.truncate(length - back);
      const bool kept = ring.cache.length() == length - back;
      CHECK((kept || ring.cache.length() == 0));
      if (back <= BlockKvCache::kSlack) CHECK(kept);
      CHECK(ring.sees_window());
      ring.grow(length - back + 70);
      CHECK(ring.sees_window());
    }
  }
}

TEST_CASE("KV cache: a step that failed takes nothing that the next one sees") {
  Ring ring;
  ring.grow(5000);
  ring.cache.begin(kChunk);
  for (size_t position = 5000; position < 5000 + kChunk; ++position) *ring.at(position) = std::byte{0xEE};
  CHECK(ring.sees_window());
  ring.cache.truncate(5000 - 900);
  CHECK(ring.sees_window());
}

TEST_CASE("KV cache: what a failed step leaves behind is no NaN for the next one") {
  constexpr size_t kLength = 5;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  for (const KvType type : {KvType::float32, KvType::float16, KvType::int8, KvType::int4}) {
    BlockKvCache cache(type, std::vector<KvCacheInfo>{{.kv_heads = 2, .head_dim = 32}}, 100, kChunk);
    cache.append_noise(kLength);
    const KvLayout layout(type, 2, 32);
    const Tensor tensor = cache.tensor("past.0", 0);
    auto* const data = static_cast<std::byte*>(tensor.data);
    const std::vector<float> bad(32, kNaN);
    for (size_t position = kLength; position < kLength + 3; ++position) {
      for (size_t head = 0; head < 2; ++head) {
        append(layout, data + layout.block_offset(head, position), position, bad.data(), bad.data());
      }
    }
    const std::vector<float> qkv(6 * 32, 0.5F);
    const std::vector<float> angles(16, 0.5F);
    const auto finite = [&] {
      std::vector<float> out(2 * 32);
      AttentionArgs args;
      args.heads = 2;
      args.tokens = 1;
      args.past = kLength;
      args.qkv = qkv.data();
      args.cos = args.sin = angles.data();
      args.cache = data;
      args.cache_blocks = static_cast<size_t>(tensor.shape[0]);
      args.out = out.data();
      attention(simd(), layout, args, {});
      return std::ranges::all_of(out, [](float x) { return std::isfinite(x); });
    };
    CHECK_FALSE(finite());  // masked positions of its block take part, with weight 0
    cache.clear(3);
    CHECK(finite());
  }
}

TEST_CASE("KV cache: a snapshot of a ring has what the next token sees, for a ring of another size, too") {
  for (const size_t length : {size_t{1}, size_t{64}, size_t{700}, size_t{5001}}) {
    CAPTURE(length);
    Ring from;
    from.grow(length);
    const std::vector<std::byte> snapshot = from.cache.snapshot(length);
    CHECK(snapshot.size() == from.cache.snapshot_bytes(length));
    Ring to;
    to.grow(1234);
    to.cache.restore(snapshot, length);
    CHECK(to.cache.length() == length);
    CHECK(to.sees_window());
    CHECK(to.cache.snapshot(length) == snapshot);
    BlockKvCache wider(KvType::int8, kMixed, kLong, 300);
    wider.restore(snapshot, length);
    CHECK(wider.snapshot(length) == snapshot);
    if (length > 200) {  // what came before is not in the snapshot
      to.cache.truncate(length - 200);
      CHECK(to.cache.length() == 0);
    }
  }
}

TEST_CASE("KV cache: a snapshot of earlier tokens has what the next one sees, as far back as the ring reaches") {
  Ring from;
  from.grow(5001);
  for (size_t length = 5001 - BlockKvCache::kSlack; length <= 5001; length += 64) {
    CAPTURE(length);
    CHECK(from.cache.reaches(length));
    Ring to;
    to.cache.restore(from.cache.snapshot(length), length);
    CHECK(to.cache.length() == length);
    CHECK(to.sees_window());
    to.cache.truncate(length - 1);
    CHECK(to.cache.length() == length - 1);
  }
  CHECK_FALSE(from.cache.reaches(2000));
  CHECK_FALSE(from.cache.reaches(0));
}

TEST_CASE("KV cache: after a snapshot the last token can be computed again, whatever the length") {
  for (size_t length = 90; length < 240; ++length) {
    CAPTURE(length);
    Ring from;
    from.grow(length);
    Ring to;
    to.cache.restore(from.cache.snapshot(length), length);
    to.cache.truncate(length - 1);
    CHECK(to.cache.length() == length - 1);
    CHECK(to.sees_window());
  }
}

TEST_CASE("dynamic state: memory that nobody has, or that no 64 bits count, is an error that says what it is for") {
  constexpr size_t kHuge = size_t{1} << 50;
  const std::pair<size_t, size_t> cases[] = {{kHuge, 1}, {kHuge, kHuge}, {std::numeric_limits<size_t>::max(), 2}};
  for (const auto& [token_bytes, context] : cases) {
    check_names(error_of<std::runtime_error>(
                    [&, bytes = token_bytes, tokens = context] { ConvolutionCache(2, bytes, tokens); }),
                "the convolutions' cache of " + std::to_string(context) + " tokens");
    CHECK_NOTHROW(ConvolutionCache(0, token_bytes, context));
  }
}

}  // namespace
}  // namespace meki
