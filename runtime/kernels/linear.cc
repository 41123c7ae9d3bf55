#include "kernels/linear.h"

#include <algorithm>
#include <cstring>

#include "base/half.h"
#include "kernels/scratch.h"

namespace meki {
namespace {

// Weights of one piece: some microseconds of streaming, so that no thread waits long for another's last piece, and
// handing it out costs little beside it.
constexpr size_t kPieceBytes = 64 << 10;

}  // namespace

void linear(const Simd& simd, const PackedWeight& weight, const float* x, size_t tokens, float* out,
            const Parallel& parallel) {
  const size_t inputs = weight.inputs;
  const size_t blocks = inputs / 32;
  Scratch& scratch = Scratch::begin(Scratch::bytes<int8_t>(tokens * inputs) + Scratch::bytes<float>(tokens * blocks) +
                                    Scratch::bytes<int32_t>(tokens * blocks));
  auto* const codes = scratch.take<int8_t>(tokens * inputs);
  auto* const scales = scratch.take<float>(tokens * blocks);
  auto* const sums = scratch.take<int32_t>(tokens * blocks);
  constexpr size_t kTokens = 8;  // of one piece of quantisation
  parallel((tokens + kTokens - 1) / kTokens, [=, &simd](size_t piece) {
    for (size_t t = piece * kTokens; t < std::min(tokens, (piece + 1) * kTokens); ++t) {
      simd.quantize(x + t * inputs, inputs, codes + t * inputs, scales + t * blocks, sums + t * blocks);
    }
  });

  const Activations activations{tokens, inputs, codes, scales, sums};
  const auto panel = weight.bits == 4 ? simd.panel4 : simd.panel8;
  const size_t panels = weight.panel_count();
  const size_t step = std::max<size_t>(1, kPieceBytes / weight.panel_bytes());
  const size_t outputs = weight.outputs;
  parallel((panels + step - 1) / step, [=, &weight](size_t piece) {
    for (size_t p = piece * step; p < std::min(panels, (piece + 1) * step); ++p) {
      const std::byte* const rows = weight.panels + p * weight.panel_bytes();
      const size_t columns = std::min<size_t>(16, outputs - p * 16);
      if (columns == 16) {
        panel(rows, activations, out + p * 16, outputs);
        continue;
      }
      for (size_t t = 0; t < tokens; ++t) {  // the last panel, where it is not full
        float full[16];
        panel(rows, {1, inputs, codes + t * inputs, scales + t * blocks, sums + t * blocks}, full, 16);
        std::copy_n(full, columns, out + t * outputs + p * 16);
      }
    }
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
