#include "runtime/kernels/linear.h"

#include <algorithm>
#include <cstring>

#include "runtime/base/half.h"
#include "runtime/kernels/each_token.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/scratch.h"

namespace meki {
namespace {

// Weights of one piece: some microseconds of streaming, so that no thread waits long for another's last piece, and
// handing it out costs little beside it.
constexpr size_t kPieceBytes = 64 << 10;
constexpr size_t kPiecesPerThread = 4;  // at least, where the weights are small
// Below so many bytes of work (weights times tokens) sharing it costs more than it brings.
constexpr size_t kSerialBytes = 128 << 10;
constexpr size_t kChunk = 512;  // elements of the input that are made and rounded together

// One row of the input, rounded.
void quantize_row(const Simd& simd, const LinearInput& input, const float* x, size_t inputs, int8_t* codes,
                  float* scales, int32_t* excess) {
  if (input.kind == LinearInput::Kind::plain) {
    simd.quantize(x, inputs, codes, scales, excess);
    return;
  }
  const bool norm = input.kind == LinearInput::Kind::norm;
  const float inverse = norm ? inverse_rms(x, inputs, input.epsilon) : 0;
  const auto gated = input.kind == LinearInput::Kind::swiglu ? simd.swiglu : simd.geglu;
  alignas(64) float made[kChunk];
  for (size_t first = 0; first < inputs; first += kChunk) {
    const size_t count = std::min(kChunk, inputs - first);
    if (norm) {
      for (size_t i = 0; i < count; ++i) made[i] = x[first + i] * inverse * input.norm_weight[first + i];
    } else {
      gated(x + first, x + inputs + first, count, made);
    }
    simd.quantize(made, count, codes + first, scales + first / 32, excess + first / 16);
  }
}

// How the panels of matrices are handed out, `step` of one matrix in a piece.
struct Pieces {
  size_t bytes;  // of a piece

  size_t step(const PackedWeight& weight) const { return std::max<size_t>(1, bytes / weight.panel_bytes()); }
  size_t count(const PackedWeight& weight) const { return (weight.panel_count() + step(weight) - 1) / step(weight); }
};

// Outputs of the panels first .. end of a matrix, whose first output stands at `out`, rows of which are `stride` apart.
void multiply(const Simd& simd, const PackedWeight& weight, const Activations& x, size_t first, size_t end,
              const float* residual, float* out, size_t stride) {
  const auto panel = simd.panels[static_cast<size_t>(weight.type)];
  const size_t blocks = x.inputs / 32;
  for (size_t p = first; p < end; ++p) {
    const std::byte* const rows = weight.panels + p * weight.panel_bytes();
    if (p * 16 + 16 <= weight.outputs) {
      panel(rows, x, out + p * 16, stride);
      continue;
    }
    for (size_t t = 0; t < x.tokens; ++t) {  // the last panel, where it is not full
      float full[16];
      const size_t at = t * blocks;
      panel(rows, {1, x.inputs, x.codes + 32 * at, x.scales + at, x.excess + 2 * at}, full, 16);
      std::copy_n(full, weight.outputs - p * 16, out + t * stride + p * 16);
    }
  }
  if (residual == nullptr) return;
  for (size_t t = 0; t < x.tokens; ++t) {
    for (size_t n = first * 16; n < std::min(weight.outputs, end * 16); ++n)
      out[t * stride + n] += residual[t * stride + n];
  }
}

}  // namespace

void linear(const Simd& simd, std::span<const PackedWeight> weights, const LinearInput& input, const LinearEnd& end,
            size_t tokens, float* out, const Parallel& parallel) {
  const size_t inputs = weights.front().inputs;
  const size_t blocks = inputs / 32;
  thread_local Scratch scratch;
  scratch.begin(Scratch::bytes<int8_t>(tokens * inputs) + Scratch::bytes<float>(tokens * blocks) +
                Scratch::bytes<int32_t>(tokens * blocks * 2));
  auto* const codes = scratch.take<int8_t>(tokens * inputs);
  auto* const scales = scratch.take<float>(tokens * blocks);
  auto* const excess = scratch.take<int32_t>(tokens * blocks * 2);
  size_t outputs = 0;
  size_t bytes = 0;
  for (const PackedWeight& weight : weights) {
    outputs += weight.outputs;
    bytes += weight.bytes();
  }
  constexpr size_t kTokens = 8;  // of one piece of rounding
  const Parallel threads = bytes * tokens < kSerialBytes ? Parallel{} : parallel;
  threads((tokens + kTokens - 1) / kTokens, [=, &simd, &input](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(tokens, (piece + 1) * kTokens); ++t) {
      quantize_row(simd, input, input.x + t * input.stride, inputs, codes + t * inputs, scales + t * blocks,
                   excess + t * blocks * 2);
    }
  });

  const Activations x{tokens, inputs, codes, scales, excess};
  const Pieces pieces{std::min(kPieceBytes, bytes / (kPiecesPerThread * threads.threads))};
  size_t count = 0;
  for (const PackedWeight& weight : weights) count += pieces.count(weight);
  const bool normed = end.post_norm_weight != nullptr;  // once all pieces of a token are done
  const float* const residual = normed ? nullptr : end.residual;
  threads(count, [=, &simd](size_t piece) {
    size_t column = 0;
    const PackedWeight* weight = weights.data();
    for (; piece >= pieces.count(*weight); ++weight) {
      piece -= pieces.count(*weight);
      column += weight->outputs;
    }
    const size_t first = piece * pieces.step(*weight);
    const size_t last = std::min(weight->panel_count(), first + pieces.step(*weight));
    multiply(simd, *weight, x, first, last, residual == nullptr ? nullptr : residual + column, out + column, outputs);
  });
  if (!normed) return;
  each_token(tokens, threads, [=, &end](size_t t) {
    float* const y = out + t * outputs;
    const float* const added = end.residual == nullptr ? nullptr : end.residual + t * outputs;
    const float inverse = inverse_rms(y, outputs, end.epsilon);
    for (size_t n = 0; n < outputs; ++n) {
      y[n] = (added == nullptr ? 0 : added[n]) + y[n] * inverse * end.post_norm_weight[n];
    }
  });
}

void embedding(const PackedWeight& weight, const int64_t* ids, size_t tokens, float* out) {
  const bool nibbles = weight_bits(weight.type) == 4;
  const auto groups = static_cast<size_t>(weight_groups(weight.type));
  for (size_t t = 0; t < tokens; ++t) {
    const auto id = static_cast<size_t>(ids[t]);
    const size_t r = id % 16;
    const std::byte* block = weight.panels + id / 16 * weight.panel_bytes();
    for (size_t b = 0; b < weight.inputs / 32; ++b, block += block_bytes(weight.type)) {
      uint16_t halves[3];  // of this row: scales, then the minimum
      for (size_t i = 0; i < groups + 1; ++i) {
        if (i == groups && !has_minimum(weight.type)) break;
        std::memcpy(&halves[i], block + code_bytes(weight.type) + 32 * i + 2 * r, sizeof(halves[i]));
      }
      const float minimum = has_minimum(weight.type) ? half_to_float(halves[groups]) : 0;
      for (size_t c = 0; c < 32; ++c) {
        const int byte = std::to_integer<int>(block[(nibbles ? c % 16 : c) / 4 * 64 + r * 4 + c % 4]);
        const int code = (nibbles ? byte >> (c < 16 ? 0 : 4) & 15 : byte) - code_offset(weight.type);
        *out++ = half_to_float(halves[c * groups / 32]) * static_cast<float>(code) + minimum;
      }
    }
  }
}

}  // namespace meki
