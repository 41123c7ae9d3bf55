#include "runtime/kernels/linear.h"

#include <algorithm>
#include <cstring>

#include "runtime/base/half.h"
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
                  float* scales, int32_t* sums) {
  if (input.kind == LinearInput::Kind::plain) {
    simd.quantize(x, inputs, codes, scales, sums);
    return;
  }
  const bool norm = input.kind == LinearInput::Kind::norm;
  const float inverse = norm ? inverse_rms(x, inputs, input.epsilon) : 0;
  alignas(64) float made[kChunk];
  for (size_t first = 0; first < inputs; first += kChunk) {
    const size_t count = std::min(kChunk, inputs - first);
    if (norm) {
      for (size_t i = 0; i < count; ++i) made[i] = x[first + i] * inverse * input.norm_weight[first + i];
    } else {
      simd.swiglu(x + first, x + inputs + first, count, made);
    }
    simd.quantize(made, count, codes + first, scales + first / 32, sums + first / 32);
  }
}

void add(const float* residual, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] += residual[i];
}

}  // namespace

void linear(const Simd& simd, const PackedWeight& weight, const LinearInput& input, const float* residual,
            size_t tokens, float* out, const Parallel& parallel) {
  const size_t inputs = weight.inputs;
  const size_t blocks = inputs / 32;
  thread_local Scratch scratch;
  scratch.begin(Scratch::bytes<int8_t>(tokens * inputs) + Scratch::bytes<float>(tokens * blocks) +
                Scratch::bytes<int32_t>(tokens * blocks));
  auto* const codes = scratch.take<int8_t>(tokens * inputs);
  auto* const scales = scratch.take<float>(tokens * blocks);
  auto* const sums = scratch.take<int32_t>(tokens * blocks);
  constexpr size_t kTokens = 8;  // of one piece of rounding
  const Parallel threads = weight.bytes() * tokens < kSerialBytes ? Parallel{} : parallel;
  threads((tokens + kTokens - 1) / kTokens, [=, &simd, &input](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(tokens, (piece + 1) * kTokens); ++t) {
      quantize_row(simd, input, input.x + t * input.stride, inputs, codes + t * inputs, scales + t * blocks,
                   sums + t * blocks);
    }
  });

  const Activations activations{tokens, inputs, codes, scales, sums};
  const auto panel = weight.bits == 4 ? simd.panel4 : simd.panel8;
  const size_t panels = weight.panel_count();
  const size_t piece_bytes = std::min(kPieceBytes, weight.bytes() / (kPiecesPerThread * threads.threads));
  const size_t step = std::max<size_t>(1, piece_bytes / weight.panel_bytes());
  const size_t outputs = weight.outputs;
  threads((panels + step - 1) / step, [=, &weight](size_t piece) {
    const size_t end = std::min(panels, (piece + 1) * step);
    for (size_t p = piece * step; p < end; ++p) {
      const std::byte* const rows = weight.panels + p * weight.panel_bytes();
      if (p * 16 + 16 <= outputs) {
        panel(rows, activations, out + p * 16, outputs);
        continue;
      }
      for (size_t t = 0; t < tokens; ++t) {  // the last panel, where it is not full
        float full[16];
        panel(rows, {1, inputs, codes + t * inputs, scales + t * blocks, sums + t * blocks}, full, 16);
        std::copy_n(full, outputs - p * 16, out + t * outputs + p * 16);
      }
    }
    if (residual == nullptr) return;
    const size_t first = piece * step * 16;
    const size_t count = std::min(outputs, end * 16) - first;
    for (size_t t = 0; t < tokens; ++t) add(residual + t * outputs + first, count, out + t * outputs + first);
  });
}

void embedding(const PackedWeight& weight, const int64_t* ids, size_t tokens, float* out) {
  const size_t code_bytes = 64 * static_cast<size_t>(weight.bits);
  for (size_t t = 0; t < tokens; ++t) {
    const auto id = static_cast<size_t>(ids[t]);
    const size_t r = id % 16;
    const std::byte* block = weight.panels + id / 16 * weight.panel_bytes();
    for (size_t b = 0; b < weight.inputs / 32; ++b, block += code_bytes + 32) {
      uint16_t half = 0;
      std::memcpy(&half, block + code_bytes + 2 * r, sizeof(half));
      const float scale = half_to_float(half);
      for (size_t c = 0; c < 32; ++c) {
        const size_t column = weight.bits == 4 ? c % 16 : c;
        const int byte = std::to_integer<int>(block[column / 4 * 64 + r * 4 + c % 4]);
        const int code = weight.bits == 4 ? ((byte >> (c < 16 ? 0 : 4)) & 15) - 8 : byte - 128;
        *out++ = scale * static_cast<float>(code);
      }
    }
  }
}

}  // namespace meki
