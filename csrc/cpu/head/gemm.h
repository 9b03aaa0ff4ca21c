// Register tiles of C [m, n] += A [m, K] B [K, n], accumulated in float or double.
//
// A is read in place, element by element, and broadcast: it is the weight or the gradient of the logits. A row of B is
// `nr` contiguous elements of a panel [K][nr]. A tile sums over K in order, so the bits of an element of C depend on
// neither m, n, its position nor the number of threads. A vendor GEMM does not promise that.
//
// In a tile of pairs, two bfloat16 of neighbouring k stand in the place of a float, and a step of K adds both products,
// each exact, to the float: twice the rate, where the processor has AVX512_BF16. The instruction treats bfloat16 and
// sums below the smallest normal float as 0.
#pragma once
#include <cstdint>
#include <utility>

#include "../simd/simd.h"

namespace qrm_fast {

// One tile: c[i][j] = (accumulate ? c[i][j] : 0) + sum_k A(i, k) b[k * nr + j] with
//   A(i, k) = a[i * a_row + k * a_step + k / nr * a_jump]
// where a_jump is for an A that is stored in panels itself. Every kAheadSteps steps the tile prefetches two cache lines
// of what the next tiles read: one from `ahead`, which moves by `ahead_jump` after nr steps, and one from `soon`.
template <typename S>
struct Tile {
  int64_t depth;
  const S* a;
  int64_t a_row, a_step, a_jump;
  const S* b;
  S* c;
  int64_t ldc;
  bool accumulate;
  const S* ahead;
  int64_t ahead_jump;
  const S* soon;
};

inline constexpr int64_t kDepth = 128;     // steps of K that a tile sums at a time
inline constexpr int64_t kAheadSteps = 8;  // divides every nr

// Elements that a tile fetches between two jumps of `ahead`.
template <typename S>
int64_t ahead_piece(int64_t nr) {
  return nr / kAheadSteps * kLineBytes / sizeof(S);
}

template <typename S>
struct GemmKernel {
  int64_t mr, nr;
  void (*tile)(const Tile<S>& t);
};

inline constexpr int64_t kLargestTile = 512;  // elements

// c += a[2i] b[0] + a[2i + 1] b[1] in lane i, for the pairs of bfloat16 in a and b.
template <typename Vec, typename S>
QRM_FAST_INLINE void add_pair_products(Vec& c, Vec a, const S& b) {
#if defined(__x86_64__)
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(b));
#endif
}

template <typename S, int Bytes, int Rows, int Vectors, bool Pairs = false>
QRM_FAST_INLINE void register_tile(const Tile<S>& t) {
  using V = Simd<S, Bytes>;
  constexpr int64_t kWidth = Vectors * V::kLanes;
  static_assert(kWidth % kAheadSteps == 0 && Rows * kWidth <= kLargestTile);
  typename V::Vec acc[Rows][Vectors] = {};
  const S *b = t.b, *ahead = t.ahead, *soon = t.soon;
  // Rows are addressed as base + {0, 1, 2} strides: a pointer for each would not fit the registers.
  constexpr int kPerBase = 3;
  static_assert(Rows % kPerBase == 0);
  const int64_t a_row = t.a_row * sizeof(S), a_step = t.a_step * sizeof(S);
  const char* a[Rows / kPerBase];
  for (int i = 0; i < Rows / kPerBase; ++i) a[i] = reinterpret_cast<const char*>(t.a) + kPerBase * i * a_row;
  const auto step = [&]() __attribute__((always_inline)) {
    typename V::Vec row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) row[j] = V::load(b + j * V::kLanes);
    // B comes from L2: its lines are asked for some steps before.
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; j += kLineBytes / sizeof(S)) __builtin_prefetch(b + kAheadSteps * kWidth + j, 0, 3);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const S& scale = *reinterpret_cast<const S*>(a[i / kPerBase] + i % kPerBase * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        if constexpr (Pairs) {
          add_pair_products(acc[i][j], row[j], scale);
        } else {
          acc[i][j] += row[j] * scale;
        }
      }
    }
    for (const char*& base : a) base += a_step;
    b += kWidth;
  };
  int64_t k = 0;
  while (k + kAheadSteps <= t.depth) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(soon, 0, 2);
    ahead += kLineBytes / sizeof(S);
    soon += kLineBytes / sizeof(S);
    for (int s = 0; s < kAheadSteps; ++s) step();
    k += kAheadSteps;
    if (k % kWidth == 0) {
      for (const char*& base : a) base += t.a_jump * sizeof(S);
      ahead += t.ahead_jump;
    }
  }
  for (; k < t.depth; ++k) step();
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      S* out = t.c + i * t.ldc + j * V::kLanes;
      V::store(out, t.accumulate ? V::load(out) + acc[i][j] : acc[i][j]);
    }
  }
}

// A tile of which only `rows` x `columns` elements of C exist.
template <typename S>
void partial_tile(const GemmKernel<S>& kernel, Tile<S> t, int64_t rows, int64_t columns) {
  S edge[kLargestTile];
  S* c = t.c;
  const int64_t ldc = t.ldc;
  t.c = edge;
  t.ldc = kernel.nr;
  const bool accumulate = std::exchange(t.accumulate, false);
  kernel.tile(t);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      S& out = c[i * ldc + j];
      out = accumulate ? out + edge[i * kernel.nr + j] : edge[i * kernel.nr + j];
    }
  }
}

}  // namespace qrm_fast
