// The products behind the heads' gradients for sm_90a: hidden's dZ W and weight's dZ^T X, what
// qrm_fast/triton/product.py gives Hopper's 16-bit inputs to. An element is summed over the depth in order, in float32,
// whatever tile it is in; a product over a longer depth may be cut into several, each starting from what the last one
// wrote. 2 M N K FLOP; clusters of two blocks stay and take one tile of 256 x 256 after the other.
#include "head_logits.h"
#include "product_launch.h"

namespace qrm_fast {

struct ScaledProduct {
  float* out;  // [rows, columns], rows `stride` apart
  int64_t stride;
  const float* scale;  // of each row, `scale_stride` apart: 0 makes a row 0; or one for all, 0 apart
  int scale_stride;
  int num_rows, num_columns;
  bool added;   // to out
  bool paired;  // out is accessed 8 bytes at a time
};

class Scaled {
 public:
  using Parameters = ScaledProduct;
  static constexpr bool kAdded = true;

  __device__ Scaled(const ScaledProduct& p, const CUtensorMap&, int warp_row, uint32_t) : p_(p), warp_row_(warp_row) {}

  __device__ void begin(float (&z)[128], Tile tile) {
    first_row_ = first_row(tile.row + warp_row_);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row_ + 8 * h;
      scale_[h] = row < p_.num_rows ? p_.scale[row * p_.scale_stride] : 1;
    }
#pragma unroll
    for (float& x : z) x = 0;
    if (!p_.added) return;
    each_pair(tile, [&](int i, float* out, bool both) {
      float2 x{0, 0};
      if (p_.paired) {
        x = *reinterpret_cast<const float2*>(out);
      } else {
        x.x = out[0];
        if (both) x.y = out[1];
      }
      z[i] = quotient(x.x, scale_[half_of(i)]);
      z[i + 1] = quotient(x.y, scale_[half_of(i)]);
    });
  }

  __device__ void end(float (&z)[128], Tile tile) {
    each_pair(tile, [&](int i, float* out, bool both) {
      const float scale = scale_[half_of(i)];
      const bool idle = p_.scale_stride != 0 && scale == 0;
      const float2 x{idle ? 0 : z[i] * scale, idle ? 0 : z[i + 1] * scale};
      if (p_.paired) {
        *reinterpret_cast<float2*>(out) = x;
      } else {
        out[0] = x.x;
        if (both) out[1] = x.y;
      }
    });
  }

 private:
  // Calls f(i, address of accumulator i, whether that of i + 1 is in out, too) for every second one in out.
  template <typename F>
  __device__ void each_pair(Tile tile, const F& f) const {
#pragma unroll
    for (int i = 0; i < 128; i += 2) {
      const int64_t row = first_row_ + 8 * half_of(i);
      const int column = tile.column + column_of(i);
      if (row < p_.num_rows && column < p_.num_columns) {
        f(i, p_.out + row * p_.stride + column, column + 1 < p_.num_columns);
      }
    }
  }

  const ScaledProduct& p_;
  const int warp_row_;
  int64_t first_row_ = 0;
  float scale_[2];
};

namespace {

template <typename T, Depth kRows>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    head_product(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                 const __grid_constant__ int depth, const __grid_constant__ ScaledProduct p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const DealtTiles tiles(p.num_rows, p.num_columns);
  multiply_tiles<T, kRows, Depth::Across, Scaled>(a, b, a, tiles, depth, p);
#else
  __trap();
#endif
}

// out = scale a @ b, plus out where `added`; a.T for a where `transposed`; scale [rows of out], or [] for all of them.
void launch_product_of(const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& scale, bool added,
                       bool transposed) {
  const bool paired = out.stride(0) % 2 == 0 && out.size(1) % 2 == 0 &&
                      reinterpret_cast<uintptr_t>(out.const_data_ptr()) % sizeof(float2) == 0;
  const ScaledProduct p{mutable_data<float>(out),
                        out.stride(0),
                        data<float>(scale),
                        static_cast<int>(scale.dim()),
                        static_cast<int>(out.size(0)),
                        static_cast<int>(out.size(1)),
                        added,
                        paired};
  dispatch_halves(a.scalar_type(), [&](auto half, CUtensorMapDataType dtype) {
    using T = decltype(half);
    const auto kernel = transposed ? head_product<T, Depth::Across> : head_product<T, Depth::Along>;
    launch_product(kernel, a, p.num_rows, ceil_div(p.num_columns, TILE_COLUMNS), true,
                   factor_map(a, dtype, transposed ? Depth::Across : Depth::Along, TILE_ROWS),
                   factor_map(b, dtype, Depth::Across, TILE_COLUMNS / 2), static_cast<int>(b.size(0)), p);
  });
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("head_product", TORCH_BOX(&qrm_fast::launch_product_of)); }
