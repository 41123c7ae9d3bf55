// runtime/executor/dynamic_state: keys and values and the inputs of convolutions, as one state of a sequence.

#include "runtime/executor/dynamic_state.h"

#include <algorithm>
#include <limits>
#include <random>
#include <stdexcept>

#include "tests/cpp/support.h"

namespace meki {
namespace {

using test::check_names;
using test::error_of;

constexpr size_t kLayers = 3;
constexpr size_t kContext = 150;
constexpr size_t kTokenBytes = 10;  // of a convolution
const KvLayout kLayout(KvType::float16, 2, 16);

std::span<std::byte> bytes_of(const Tensor& tensor) {
  size_t bytes = 1;
  for (const int64_t size : tensor.shape) bytes *= static_cast<size_t>(size);
  return {static_cast<std::byte*>(tensor.data), bytes};
}

bool same(std::span<const std::byte> a, std::span<const std::byte> b) { return std::ranges::equal(a, b); }

struct State {
  explicit State(size_t convolutions_, uint32_t seed = 0)
      : convolutions(convolutions_), state({kLayout, kLayers, kContext}, {convolutions, kTokenBytes, kContext}) {
    std::mt19937 random(seed);
    for (const std::span<std::byte> memory : all()) {
      for (std::byte& byte : memory) byte = seed == 0 ? std::byte{0} : static_cast<std::byte>(random());
    }
  }
  std::span<std::byte> kv_cache(size_t layer) const { return bytes_of(state.kv_cache().tensor("past", layer)); }
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
    CHECK(state.state.snapshot().size() == snapshot_bytes(2, length));
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
      const std::vector<std::byte> snapshot = from.state.snapshot();
      CHECK(snapshot.size() == snapshot_bytes(convolutions, length));
      State to(convolutions, 3);
      const State before(convolutions, 3);
      to.state.append(99);
      to.state.restore(snapshot, length);
      CHECK(to.state.length() == length);
      for (size_t layer = 0; layer < kLayers; ++layer) {
        const size_t used = kLayout.bytes(length);
        CHECK(same(to.kv_cache(layer).first(used), from.kv_cache(layer).first(used)));
        CHECK(same(to.kv_cache(layer).subspan(used), before.kv_cache(layer).subspan(used)));
      }
      for (size_t layer = 0; layer < convolutions; ++layer) {
        const size_t used = length * kTokenBytes;
        CHECK(same(to.convolution(layer).first(used), from.convolution(layer).first(used)));
        CHECK(same(to.convolution(layer).subspan(used), before.convolution(layer).subspan(used)));
      }
      CHECK(to.state.snapshot() == snapshot);
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
