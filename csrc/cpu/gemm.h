// GEMM on packed panels: C [M, N] += A [M, K] B [K, N], accumulated in float or double.
//
// A is packed as panels of `mr` rows, [panel][K][mr]; B as panels of `nr` columns, [panel][K][nr]. A register tile is
// mr x nr accumulators and walks K in order, kDepth steps at a time, so an element of C has the same bits whatever M,
// N, its position and the thread count are: the reason that a vendor GEMM is not used here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "simd.h"

namespace qrm_fast {

inline constexpr int64_t kDepth = 256;  // K steps per pass: an A panel stays in L1, a B block in L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised scratch, aligned to a cache line.
template <typename S>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<S*>(::operator new(std::max<int64_t>(count, 1) * sizeof(S), kAlign))) {}
  S* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(S* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<S, Delete> data_;
};

// A register tile: c[mr][nr] (row stride ldc) = (accumulate ? c : 0) + a[k][mr]^T b[k][nr].
template <typename S>
struct GemmKernel {
  int64_t mr, nr;
  void (*tile)(int64_t depth, const S* a, const S* b, S* c, int64_t ldc, bool accumulate);
};

inline constexpr int64_t kLargestTile = 512;  // elements

template <typename S, int Bytes, int Rows, int Vectors>
QRM_FAST_INLINE void register_tile(int64_t depth, const S* a, const S* b, S* c, int64_t ldc, bool accumulate) {
  using V = Simd<S, Bytes>;
  typename V::Vec acc[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    typename V::Vec row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) row[j] = V::load(b + j * V::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const S scale = a[i];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] += row[j] * scale;
    }
    a += Rows;
    b += Vectors * V::kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      S* out = c + i * ldc + j * V::kLanes;
      V::store(out, accumulate ? V::load(out) + acc[i][j] : acc[i][j]);
    }
  }
}

// Packs `count` vectors of length `depth` into panels of `width`, zero-filled at the edge: dst [panel][depth][width].
// Element (i, k) is src[i * stride + k * depth_stride], or src[rows[i] * stride + ...] where `rows` is given.
template <typename In, typename S>
void pack_panels(const In* src, int64_t stride, int64_t depth_stride, const int64_t* rows, int64_t begin, int64_t count,
                 int64_t depth, int64_t width, S* dst) {
  constexpr int64_t kLine = 16;
  for (int64_t first = begin; first < begin + count; first += width) {
    const int64_t filled = std::min(width, begin + count - first);
    if (filled < width) std::fill(dst, dst + depth * width, S(0));
    if (stride == 1 && rows == nullptr) {
      for (int64_t k = 0; k < depth; ++k) {
        const In* in = src + first + k * depth_stride;
        for (int64_t i = 0; i < filled; ++i) dst[k * width + i] = static_cast<S>(in[i]);
      }
    } else {
      for (int64_t k0 = 0; k0 < depth; k0 += kLine) {
        const int64_t k1 = std::min(depth, k0 + kLine);
        for (int64_t i = 0; i < filled; ++i) {
          const In* in = src + (rows ? rows[first + i] : first + i) * stride;
          for (int64_t k = k0; k < k1; ++k) dst[k * width + i] = static_cast<S>(in[k * depth_stride]);
        }
      }
    }
    dst += depth * width;
  }
}

// C [m, n] = (accumulate ? C : 0) + A B from packed panels of full depth. Tiles over the edge go through a small
// buffer.
template <typename S>
void multiply_panels(const GemmKernel<S>& kernel, int64_t m, int64_t n, int64_t depth, const S* a, const S* b, S* c,
                     int64_t ldc, bool accumulate) {
  const int64_t mr = kernel.mr, nr = kernel.nr;
  S edge[kLargestTile];
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t step = std::min(kDepth, depth - k);
    const bool add = accumulate || k > 0;
    for (int64_t i = 0; i < m; i += mr) {
      for (int64_t j = 0; j < n; j += nr) {
        const S* a_panel = a + i * depth + k * mr;
        const S* b_panel = b + j * depth + k * nr;
        S* out = c + i * ldc + j;
        if (i + mr <= m && j + nr <= n) {
          kernel.tile(step, a_panel, b_panel, out, ldc, add);
          continue;
        }
        kernel.tile(step, a_panel, b_panel, edge, nr, false);
        for (int64_t r = 0; r < std::min(mr, m - i); ++r) {
          for (int64_t q = 0; q < std::min(nr, n - j); ++q) {
            S& element = out[r * ldc + q];
            element = add ? element + edge[r * nr + q] : edge[r * nr + q];
          }
        }
      }
    }
  }
}

}  // namespace qrm_fast
