#pragma once

// Attention over vectors (common.h): the members of Simd that read a block of the cache, and the online softmax.

#include "runtime/kernels/simd/common.h"

namespace meki {
namespace {

constexpr size_t kBlock = KvLayout::kBlock;
constexpr size_t kGroup = KvLayout::kGroup;

// Calls tile<Q>(first) for queries first .. first + Q - 1, kLargest at a time.
template <int kLargest, class Tile>
void for_queries(size_t count, Tile tile) {
  size_t q = 0;
  if constexpr (kLargest == 4) {
    for (; q + 4 <= count; q += 4) tile.template operator()<4>(q);
  }
  for (; q + 2 <= count; q += 2) tile.template operator()<2>(q);
  for (; q < count; ++q) tile.template operator()<1>(q);
}

// Calls columns<V>(first) for the V vectors of columns from `first` on, kLargest at a time, then half as many. `count`
// is a multiple of 16.
template <int kLargest, class Columns>
void for_columns(size_t count, Columns columns, size_t e = 0) {
  for (; e + kLanes * kLargest <= count; e += kLanes * kLargest) columns.template operator()<kLargest>(e);
  if constexpr (kLanes * kLargest > 16) for_columns<kLargest / 2>(count, columns, e);
}

// What is streamed is asked for once, for the first queries. Of nibbles on every processor: what is to be done with the
// bytes at hand is so much that the next ones would be asked for late (docs/architecture.md, "Attention").
constexpr size_t kNibblesAhead = 18 << 10;
inline size_t ahead_of(size_t first, size_t ahead = kFetchAhead) { return first == 0 ? ahead : 0; }

// Of kDepth rows of codes, V vectors.
template <int V>
[[gnu::always_inline]] inline void fetch_rows(const std::byte* at, size_t columns, size_t ahead) {
  for (size_t row = 0; row < kDepth; row += 4) fetch(at + row * columns, ahead, 4 * kLanes * V);
}

// sum[q][v] += sum over k of numbers[q][k] * rows[k][vector v], for `count` rows of `columns` elements.
template <int Q, int V, class T>
void add_products(const T* rows, size_t columns, size_t count, const float* numbers, size_t stride, size_t ahead,
                  Floats (&sum)[Q][V]) {
  for (size_t k = 0; k < count; ++k) {
    fetch(rows + k * columns, ahead, kLanes * V * sizeof(T));
    for (int v = 0; v < V; ++v) {
      const Floats row = load(rows + k * columns + kLanes * v);
      for (int q = 0; q < Q; ++q) sum[q][v] = fma(row, broadcast(numbers[q * stride + k]), sum[q][v]);
    }
  }
}

template <class T>
void scores_float(const Queries& queries, const std::byte* block, float* scores) {
  const T* const keys = reinterpret_cast<const T*>(block);
  for_queries<4>(queries.count, [=, &queries]<int Q>(size_t first) {
    constexpr int V = kFloatVectors<Q>;
    const size_t head_dim = queries.head_dim;
    for (size_t p = 0; p < kBlock; p += kLanes * V) {
      Floats sum[Q][V] = {};
      add_products(keys + p, kBlock, head_dim, queries.values + first * head_dim, head_dim, ahead_of(first), sum);
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) store(scores + (first + q) * kBlock + p + kLanes * v, sum[q][v]);
      }
    }
  });
}

template <class T>
void values_float(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs) {
  const T* const values = reinterpret_cast<const T*>(block);
  for_queries<4>(count, [=]<int Q>(size_t first) {
    for_columns<kFloatVectors<Q>>(head_dim, [&]<int V>(size_t e) {
      float* const out = outputs + first * head_dim + e;
      Floats sum[Q][V];
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) sum[q][v] = load(out + q * head_dim + kLanes * v);
      }
      add_products(values + e, head_dim, kBlock, weights + first * kBlock, kBlock, ahead_of(first), sum);
      for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) store(out + q * head_dim + kLanes * v, sum[q][v]);
      }
    });
  });
}

// sums[q][v] += sum over k of numbers[q][k] * code k of the columns of vector v, for codes int8 [count /
// 4][columns][4].
template <int Q, int V, class Numbers>
void add_byte_products(const std::byte* codes, size_t columns, size_t count, const Numbers (&numbers)[Q], size_t ahead,
                       Sums<Q, V>& sums) {
  for (size_t k = 0; k < count; k += kDepth) {
    fetch_rows<V>(codes + k * columns, columns, ahead);
    Code code[V];
    for (int v = 0; v < V; ++v) {
      code[v] = unpack<Numbers::kByteOffset>(load_rows(codes + k * columns + 4 * kLanes * v, 4 * columns));
    }
    for (int q = 0; q < Q; ++q) sums.add(q, 0, code, numbers[q], k);
  }
}

// The same for kDepth rows of nibbles 0 to 15, N vectors of them from vector v on: the low ones are of numbers from k
// on, the high ones `half` behind.
template <int N, int Q, int V, class Numbers>
[[gnu::always_inline]] inline void add_nibbles(const std::byte* codes, size_t columns, const Numbers (&numbers)[Q],
                                               size_t k, size_t half, int v, Sums<Q, V>& sums) {
  Code low[N];
  Code high[N];
  for (int i = 0; i < N; ++i) {
    const Bytes bytes = load_rows(codes + 4 * kLanes * i, 4 * columns);
    low[i] = low_nibbles(bytes);
    high[i] = high_nibbles(bytes);
  }
  for (int q = 0; q < Q; ++q) {
    sums.add(q, v, low, numbers[q], k);
    sums.add(q, v, high, numbers[q], half + k);
  }
}

inline void scores_int8(const Queries& queries, const std::byte* block, float* scores) {
  for_queries<4>(queries.count, [=, &queries]<int Q>(size_t first) {
    constexpr int V = kInt8ScoreVectors<Q>;
    const auto* const scales = reinterpret_cast<const float*>(block);
    QueryNumbers numbers[Q];
    int32_t excess[Q] = {};
    for (int q = 0; q < Q; ++q) {
      numbers[q].set(queries, first + q);
      if constexpr (QueryNumbers::kByteOffset != 0) {
        const size_t groups = queries.head_dim / 16;
        for (size_t g = 0; g < groups; ++g) excess[q] += queries.sums[(first + q) * groups + g];
        excess[q] *= QueryNumbers::kByteOffset;
      }
    }
    for (size_t p = 0; p < kBlock; p += kLanes * V) {
      const size_t at = kBlock * sizeof(float) + 4 * p;
      Sums<Q, V> sums;
      for (int q = 0; q < Q; ++q) sums.start(q, -excess[q]);
      add_byte_products(block + at, kBlock, queries.head_dim, numbers, ahead_of(first), sums);
      for (int q = 0; q < Q; ++q) {
        const Floats query_scale = broadcast(queries.scales[first + q]);
        for (int v = 0; v < V; ++v) {
          const Floats scale = mul(load(scales + p + kLanes * v), query_scale);
          store(scores + (first + q) * kBlock + p + kLanes * v, mul(to_floats(sums.get(q, v)), scale));
        }
      }
    }
  });
}

inline void scores_int4(const Queries& queries, const std::byte* block, float* scores) {
  for_queries<4>(queries.count, [=, &queries]<int Q>(size_t first) {
    constexpr int V = kInt4ScoreVectors<Q>;
    const size_t groups = queries.head_dim / kGroup;
    const auto* const scales = reinterpret_cast<const uint16_t*>(block);
    QueryNumbers numbers[Q];
    for (int q = 0; q < Q; ++q) numbers[q].set(queries, first + q);
    for (size_t p = 0; p < kBlock; p += kLanes * V) {
      Floats total[Q][V] = {};
      for (size_t g = 0; g < groups; ++g) {
        const size_t at = groups * kBlock * sizeof(uint16_t) + g * kGroup / 2 * kBlock + 4 * p;
        Sums<Q, V> sums;
        for (int q = 0; q < Q; ++q) {
          const int32_t* const of_query = queries.sums + (first + q) * 2 * groups + 2 * g;
          sums.start(q, -8 * (of_query[0] + of_query[1]));  // nibbles are code + 8
        }
        constexpr int N = V < kNibbleVectors ? V : kNibbleVectors;
#pragma GCC unroll 1  // unrolled, GCC moves additions around until it spills
        for (size_t k = 0; k < kGroup / 2; k += kDepth) {
          const std::byte* const codes = block + at + k * kBlock;
          fetch_rows<V>(codes, kBlock, ahead_of(first, kNibblesAhead));
          for (int v = 0; v < V; v += N) {
            add_nibbles<N>(codes + 4 * kLanes * v, kBlock, numbers, g * kGroup + k, kGroup / 2, v, sums);
          }
        }
        for (int v = 0; v < V; ++v) {
          const Floats scale = load(scales + g * kBlock + p + kLanes * v);
          for (int q = 0; q < Q; ++q) total[q][v] = fma(to_floats(sums.get(q, v)), scale, total[q][v]);
        }
      }
      for (int q = 0; q < Q; ++q) {
        const Floats scale = broadcast(queries.scales[first + q]);
        for (int v = 0; v < V; ++v) {
          store(scores + (first + q) * kBlock + p + kLanes * v, mul(total[q][v], scale));
        }
      }
    }
  });
}

// weight * value scale in 8 bits: codes 0 .. 255 that are worth `unit` each.
template <class T>
void quantize_weights(const float* weights, const T* scales, WeightNumbers& out) {
  constexpr int N = kBlock / kLanes;
  Floats scaled[N];
  for (int v = 0; v < N; ++v) scaled[v] = mul(load(weights + kLanes * v), load(scales + kLanes * v));
  const float largest = largest_or_nan(scaled);
  const Floats inverse = broadcast(quantizer(255, largest));
  Ints rounded[N];
  for (int v = 0; v < N; ++v) rounded[v] = round(mul(scaled[v], inverse));
  out.set(rounded);
  out.unit = largest / 255;
}

// out[q][vector v] += sums * unit, for `count` vectors from `first` on.
template <int Q, int V>
void add_scaled(const Sums<Q, V>& sums, const WeightNumbers (&weights)[Q], float* out, size_t head_dim, int first = 0,
                int count = V) {
  for (int q = 0; q < Q; ++q) {
    const Floats unit = broadcast(weights[q].unit);
    for (int v = first; v < first + count; ++v) {
      float* const at = out + q * head_dim + kLanes * v;
      store(at, fma(to_floats(sums.get(q, v)), unit, load(at)));
    }
  }
}

inline void values_int8(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs) {
  // Inlined into one function, GCC spills what the inner loops of all Q need.
  for_queries<kInt8ValueQueries>(count, [=]<int Q>(size_t first) __attribute__((noinline)) {
    WeightNumbers numbers[Q];
    for (int q = 0; q < Q; ++q) {
      quantize_weights(weights + (first + q) * kBlock, reinterpret_cast<const float*>(block), numbers[q]);
    }
    for_columns<kInt8ValueVectors<Q>>(head_dim, [&]<int V>(size_t e) {
      const size_t at = kBlock * sizeof(float) + 4 * e;
      Sums<Q, V> sums;
      for (int q = 0; q < Q; ++q) sums.start(q, -WeightNumbers::kByteOffset * numbers[q].sum);
      add_byte_products(block + at, head_dim, kBlock, numbers, ahead_of(first), sums);
      add_scaled(sums, numbers, outputs + first * head_dim + e, head_dim);
    });
  });
}

inline void values_int4(const float* weights, size_t count, size_t head_dim, const std::byte* block, float* outputs) {
  // As in values_int8: rows are read from end to end, because hardware fetches ahead, though every group of 32 elements
  // has weights of its own.
  for_queries<kInt8ValueQueries>(count, [=]<int Q>(size_t first) __attribute__((noinline)) {
    const size_t groups = head_dim / kGroup;
    WeightNumbers numbers[KvLayout::kMaxHeadDim / kGroup][Q];
    for (size_t g = 0; g < groups; ++g) {
      for (int q = 0; q < Q; ++q) {
        const auto* const scales = reinterpret_cast<const uint16_t*>(block) + g * kBlock;
        quantize_weights(weights + (first + q) * kBlock, scales, numbers[g][q]);
      }
    }
    for_columns<kInt8ValueVectors<Q>>(head_dim, [&]<int V>(size_t e) {
      constexpr int N = V < kVectors ? V : kVectors;  // of one group
      const std::byte* const codes = block + groups * kBlock * sizeof(uint16_t) + 4 * e;
      Sums<Q, V> sums;
      for (int v = 0; v < V; v += N) {
        const WeightNumbers(&of_group)[Q] = numbers[e / kGroup + v / kVectors];
        for (int q = 0; q < Q; ++q) sums.start(q, -8 * of_group[q].sum, v, N);  // nibbles are code + 8
      }
#pragma GCC unroll 1
      for (size_t k = 0; k < kBlock / 2; k += kDepth) {
        fetch_rows<V>(codes + k * head_dim, head_dim, ahead_of(first, kNibblesAhead));
        for (int v = 0; v < V; v += N) {
          const WeightNumbers(&of_group)[Q] = numbers[e / kGroup + v / kVectors];
          add_nibbles<N>(codes + k * head_dim + 4 * kLanes * v, head_dim, of_group, k, kBlock / 2, v, sums);
        }
      }
      for (int v = 0; v < V; v += N) {
        const WeightNumbers(&of_group)[Q] = numbers[e / kGroup + v / kVectors];
        add_scaled(sums, of_group, outputs + first * head_dim + e, head_dim, v, N);
      }
    });
  });
}

inline float quantize_head(const float* x, size_t size, int8_t* codes, int32_t* sums) {
  float largest = 0;
  float rest[32] = {};  // the last 16, where they are not part of 32
  for (size_t i = 0; i < size; i += 32) {
    if (i + 16 == size) {
      for (size_t e = 0; e < 16; ++e) rest[e] = x[i + e];
    }
    const float magnitude = largest_of_32(i + 16 == size ? rest : x + i);
    largest = magnitude <= largest ? largest : magnitude;  // NaN, too: then nothing is less
    if (magnitude != magnitude) break;
  }
  const Floats inverse = broadcast(quantizer(127, largest));
  for (size_t i = 0; i < size; i += 32) {
    int8_t last[32];
    const bool whole = i + 32 <= size;
    Ints code[kVectors];
    round_32(whole ? x + i : rest, inverse, code, whole ? codes + i : last);
    if (!whole) {
      for (size_t e = 0; e < 16; ++e) codes[i + e] = last[e];
    }
    if (sums == nullptr) continue;
    sums[i / 16] = sum_of(add_16(code, 0));
    if (whole) sums[i / 16 + 1] = sum_of(add_16(code, 1));
  }
  return largest / 127;
}

inline void rotate(const float* x, size_t size, float factor, const float* weight, const float* cos, const float* sin,
                   float scale, float* out) {
  const size_t half = size / 2;
  size_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Floats a = load(x + i);
    Floats b = load(x + half + i);
    if (weight != nullptr) {
      a = mul(mul(a, broadcast(factor)), load(weight + i));
      b = mul(mul(b, broadcast(factor)), load(weight + half + i));
    }
    const Floats c = load(cos + i);
    const Floats s = load(sin + i);
    store(out + i, mul(sub(mul(a, c), mul(b, s)), broadcast(scale)));
    store(out + half + i, mul(add(mul(b, c), mul(a, s)), broadcast(scale)));
  }
  for (; i < half; ++i) {
    const float a = weight == nullptr ? x[i] : x[i] * factor * weight[i];
    const float b = weight == nullptr ? x[half + i] : x[half + i] * factor * weight[half + i];
    out[i] = (a * cos[i] - b * sin[i]) * scale;
    out[half + i] = (b * cos[i] + a * sin[i]) * scale;
  }
}

// 1 in lanes whose bit kStride is clear, else -1.
template <size_t kStride>
Floats alternating_signs() {
  float signs[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) signs[lane] = (lane & kStride) == 0 ? 1.0F : -1.0F;
  return load(signs);
}

// The levels of the transform over lanes that are kStride and more apart.
template <size_t kStride = 1>
Floats add_and_subtract_lanes(Floats x) {
  if constexpr (kStride == kLanes)
    return x;
  else
    return add_and_subtract_lanes<2 * kStride>(fma(x, alternating_signs<kStride>(), exchange<kStride>(x)));
}

// All levels of the transform within N vectors, for each N of `values`, and a factor.
template <int N>
void transform(float* values, size_t size, float factor) {
  for (size_t i = 0; i < size; i += N * kLanes) {
    Floats x[N];
    for (int v = 0; v < N; ++v) x[v] = add_and_subtract_lanes(load(values + i + v * kLanes));
    for (int stride = 1; stride < N; stride *= 2) {
      for (int v = 0; v < N; ++v) {
        if ((v & stride) != 0) continue;
        const Floats a = x[v];
        x[v] = add(a, x[v + stride]);
        x[v + stride] = sub(a, x[v + stride]);
      }
    }
    for (int v = 0; v < N; ++v) store(values + i + v * kLanes, mul(x[v], broadcast(factor)));
  }
}

inline void hadamard(float* values, size_t size) {
  constexpr size_t kMost = 8;  // vectors, in registers
  const size_t run = size & (~size + 1);
  const float norm = 1 / __builtin_sqrtf(static_cast<float>(run));
  const size_t vectors = run / kLanes < kMost ? run / kLanes : kMost;
  const float factor = vectors * kLanes == run ? norm : 1;  // that of the last level
  if (vectors == 8) transform<8>(values, size, factor);
  if (vectors == 4) transform<4>(values, size, factor);
  if (vectors == 2) transform<2>(values, size, factor);
  if (vectors == 1) transform<1>(values, size, factor);
  for (size_t stride = vectors * kLanes; stride < run; stride *= 2) {
    const Floats last = broadcast(2 * stride == run ? norm : 1);
    for (size_t first = 0; first < size; first += 2 * stride) {
      for (size_t i = first; i < first + stride; i += kLanes) {
        const Floats a = load(values + i);
        const Floats b = load(values + i + stride);
        store(values + i, mul(add(a, b), last));
        store(values + i + stride, mul(sub(a, b), last));
      }
    }
  }
}

inline void softmax(float* scores, float* maximum, float* sum, float* output, size_t head_dim) {
  constexpr int N = kBlock / kLanes;
  Floats most = load(scores);
  for (int v = 1; v < N; ++v) most = larger(most, load(scores + kLanes * v));
  const float block_max = largest_of(most);
  const float largest = block_max > *maximum ? block_max : *maximum;
  Floats total = broadcast(0);
  if (largest == -__builtin_inff()) {  // nothing to see but, perhaps, NaN
    for (int v = 0; v < N; ++v) {
      const Floats weight = only_nan(load(scores + kLanes * v));
      total = add(total, weight);
      store(scores + kLanes * v, weight);
    }
    *sum += sum_of(total);
    return;
  }
  if (largest > *maximum) {
    const Floats shrink = exp_negative(broadcast(*maximum - largest));
    *sum *= first_of(shrink);
    for (size_t e = 0; e < head_dim; e += kLanes) store(output + e, mul(load(output + e), shrink));
    *maximum = largest;
  }
  for (int v = 0; v < N; ++v) {
    const Floats weight = exp_negative(sub(load(scores + kLanes * v), broadcast(largest)));
    total = add(total, weight);
    store(scores + kLanes * v, weight);
  }
  *sum += sum_of(total);
}

}  // namespace
}  // namespace meki
