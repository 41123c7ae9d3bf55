// base/half.h and kernels/kv_cache: what comes back of what is stored, against the definitions.

#include "runtime/kernels/kv_cache.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "runtime/base/half.h"
#include "tests/cpp/kernels/kernels_support.h"

namespace meki {
namespace {

using test::Bytes;
using test::check_names;
using test::error_of;
using test::Errors;
using test::head_dims;
using test::kKvTypes;
using test::kRounding;
using test::Random;
using test::Stored;
using test::stored_key;
using test::stored_value;

constexpr size_t kBlock = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The element of largest magnitude.
double extreme_of(std::span<const float> values) {
  double extreme = 0;
  for (const double value : values) extreme = std::fabs(value) > std::fabs(extreme) ? value : extreme;
  return extreme;
}

TEST_CASE("half: all values round-trip") {
  for (uint32_t bits = 0; bits < 65'536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float expected = test::naive_half(half);
    const float value = half_to_float(half);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(value));
      REQUIRE(std::isnan(half_to_float(float_to_half(value))));
    } else {
      REQUIRE(value == expected);
      REQUIRE(float_to_half(value) == half);  // -0 too
    }
  }
}

TEST_CASE("half: float_to_half is the nearest, ties to even") {
  const auto check = [](float value) {
    CAPTURE(value);
    REQUIRE(float_to_half(value) == test::naive_to_half(value));
    REQUIRE(float_to_half(-value) == test::naive_to_half(-value));
  };
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const double below = test::naive_half(static_cast<uint16_t>(bits));
    const double above = bits == 0x7BFF ? 65536 : double{test::naive_half(static_cast<uint16_t>(bits + 1))};
    const auto middle = static_cast<float>((below + above) / 2);  // exact
    for (const float value : {std::nextafter(middle, 0.0F), middle, std::nextafter(middle, kInfinity)}) check(value);
  }
  Random random(1);
  for (int i = 0; i < 100'000; ++i) check(std::ldexp(random.uniform(1, 2), random.between(-149, 127)));
  for (const float value : {kInfinity, kNaN, std::numeric_limits<float>::max()}) check(value);
}

TEST_CASE("kv types: names") {
  for (const KvType type : kKvTypes) CHECK(parse_kv_type(name_of(type)) == type);
  CHECK(name_of(KvType::int8) == "int8");
  const std::string message = error_of<std::invalid_argument>([] { parse_kv_type("int5"); });
  for (const char* part : {"int5", "float32", "float16", "int8", "int4"}) check_names(message, part);
}

TEST_CASE("kv layout: sizes") {
  // A block of 64 positions: 2 * 64 * head_dim elements and the scales.
  CHECK(KvLayout(KvType::float32, 8, 128).block_bytes() == 2 * 64 * 128 * 4);
  CHECK(KvLayout(KvType::float16, 8, 128).block_bytes() == 2 * 64 * 128 * 2);
  CHECK(KvLayout(KvType::int8, 8, 128).block_bytes() == 2 * 64 * (128 + 4));
  CHECK(KvLayout(KvType::int4, 8, 128).block_bytes() == 2 * 64 * (128 / 2 + 4 * 2));
  const KvLayout layout(KvType::int8, 3, 16);
  CHECK(layout.block_bytes() == 2560);
  CHECK(layout.bytes(0) == 0);
  CHECK(layout.bytes(64) == 3 * 2560);
  CHECK(layout.bytes(65) == 6 * 2560);
  CHECK(layout.block_offset(2, 63) == 16 * 2560);
  CHECK(layout.block_offset(1, 64) == 9 * 2560);
  CHECK(layout.block_offset(2, 511) == 23 * 2560);
  CHECK(layout.block_offset(1, 512) == 32 * 2560);
  CHECK(KvLayout::blocks_for(0) == 0);
  CHECK(KvLayout::blocks_for(1) == 8);
  CHECK(KvLayout::blocks_for(512) == 8);
  CHECK(KvLayout::blocks_for(513) == 16);

  for (const size_t wrong : {size_t{0}, size_t{8}, size_t{24}, size_t{528}}) {
    check_names(error_of<std::invalid_argument>([&] { KvLayout(KvType::int8, 1, wrong); }), std::to_string(wrong));
  }
  check_names(error_of<std::invalid_argument>([] { KvLayout(KvType::int4, 1, 48); }), "48");
  CHECK_NOTHROW(KvLayout(KvType::int4, 1, 512));
}

TEST_CASE("kv append: every element comes back within its rounding, whatever the order of slots") {
  for (const KvType type : kKvTypes) {
    for (const size_t head_dim : head_dims(type)) {
      CAPTURE(name_of(type));
      CAPTURE(head_dim);
      Random random(7);
      const KvLayout layout(type, 1, head_dim);
      Bytes block(layout.block_bytes());
      std::vector<float> keys(kBlock * head_dim);
      std::vector<float> values(kBlock * head_dim);
      for (size_t i = 0; i < 3 * kBlock; ++i) {  // slots in random order, most of them twice, then all that are left
        const size_t slot = i < 2 * kBlock ? random.below(kBlock) : i % kBlock;
        const float magnitude = std::ldexp(1.0F, random.between(-10, 10));
        const std::vector<float> key = random.floats(head_dim, -magnitude, magnitude);
        const std::vector<float> value = random.floats(head_dim, -1, magnitude);
        std::copy(key.begin(), key.end(), keys.begin() + static_cast<ptrdiff_t>(slot * head_dim));
        std::copy(value.begin(), value.end(), values.begin() + static_cast<ptrdiff_t>(slot * head_dim));
        append(layout, block.data(), slot, key.data(), value.data());
      }
      Errors errors;
      const auto check = [&](const std::vector<float>& floats, bool are_keys, auto&& stored) {
        for (size_t p = 0; p < kBlock; ++p) {
          const std::span<const float> row(floats.data() + p * head_dim, head_dim);
          for (size_t e = 0; e < head_dim; ++e) {
            const Stored got = stored(type, head_dim, block.data(), p, e);
            const double x = row[e];
            if (type == KvType::float32) errors.add(got.value(), x, 0);
            if (type == KvType::float16) errors.add(got.value(), test::naive_half(test::naive_to_half(x)), 0);
            if (type == KvType::int8) {
              // Half a scale; three roundings move a code by up to 127 * 3 * 2^-24.
              const double scale = std::fabs(extreme_of(row)) / 127;
              errors.add(got.scale, scale, scale * 2 * kRounding);
              errors.add(got.value(), x, scale * (0.5 + 127 * 4 * kRounding));
              errors.add(got.code, 0, 127);
            }
            if (type == KvType::int4) {
              // The element of largest magnitude is 7 scales of a value, -8 of a key. As a half the scale is off by
              // 2^-11, or by half of the least half.
              const std::span<const float> group = row.subspan(e / 32 * 32, 32);
              const double scale = are_keys ? extreme_of(group) / -8 : std::fabs(extreme_of(group)) / 7;
              errors.add(got.scale, scale, std::max(std::fabs(scale) * 0x1p-11, 0x1p-25) * (1 + 8 * kRounding));
              // What is lost is half a scale, or all that lies beyond codes -8 .. 7.
              const double beyond = std::fabs(x - got.scale * std::clamp(x / got.scale, -8.0, 7.0));
              errors.add(got.value(), x, std::max(std::fabs(got.scale) * (0.5 + 8 * 4 * kRounding), beyond));
              errors.add(got.code, -0.5, 7.5);
            }
          }
        }
      };
      check(keys, true, stored_key);
      check(values, false, stored_value);
      CHECK(errors.worst() <= 1);
    }
  }
}

TEST_CASE("kv append: zeros are zeros, NaN and infinity do not become numbers") {
  for (const KvType type : kKvTypes) {
    CAPTURE(name_of(type));
    const KvLayout layout(type, 1, 32);
    Bytes block(layout.block_bytes());
    std::byte* const bytes = block.data();
    std::vector<float> row(32);
    append(layout, bytes, 5, row.data(), row.data());
    for (size_t e = 0; e < 32; ++e) {
      REQUIRE(stored_key(type, 32, bytes, 5, e).value() == 0);
      REQUIRE(stored_value(type, 32, bytes, 5, e).value() == 0);
    }
    for (const float wrong : {kNaN, kInfinity, -kInfinity}) {
      row[9] = wrong;
      append(layout, bytes, 5, row.data(), row.data());
      CHECK_FALSE(std::isfinite(stored_key(type, 32, bytes, 5, 9).value()));
      CHECK_FALSE(std::isfinite(stored_value(type, 32, bytes, 5, 9).value()));
    }
  }
}

}  // namespace
}  // namespace meki
