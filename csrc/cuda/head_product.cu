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
  const float* scale;  // a power of 2 of each row, `scale_stride` apart: 0 makes a row 0; or one for all, 0 apart
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
    const int64_t row = first_row(tile.row + warp_row_);
    const int column = tile.column + column_of(0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = row + 8 * h < p_.num_rows;
      scale_[h] = inside ? p_.scale[(row + 8 * h) * p_.scale_stride] : 1;
      out_[h] = p_.out + (row + 8 * h) * p_.stride + column;
      num_columns_[h] = inside ? p_.num_columns - column : 0;
    }
#pragma unroll
    for (float& x : z) x = 0;
    if (!p_.added) return;
    const float inverse[2] = {quotient(1, scale_[0]), quotient(1, scale_[1])};
    if (p_.paired) {
      each_pair([&](int i, const float* out, bool) {
        const float2 x = *reinterpret_cast<const float2*>(out);
        z[i] = x.x;
        z[i + 1] = x.y;
      });
    } else {
      each_pair([&](int i, const float* out, bool both) {
        z[i] = out[0];
        if (both) z[i + 1] = out[1];
      });
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) z[i] *= inverse[half_of(i)];
  }

  __device__ void end(float (&z)[128], Tile) {
    const bool idle[2] = {p_.scale_stride != 0 && scale_[0] == 0, p_.scale_stride != 0 && scale_[1] == 0};
#pragma unroll
    for (int i = 0; i < 128; ++i) z[i] = idle[half_of(i)] ? 0 : z[i] * scale_[half_of(i)];
    if (p_.paired) {
      each_pair([&](int i, float* out, bool) { *reinterpret_cast<float2*>(out) = {z[i], z[i + 1]}; });
    } else {
      each_pair([&](int i, float* out, bool both) {
        out[0] = z[i];
        if (both) out[1] = z[i + 1];
      });
    }
  }

 private:
  // Calls f(i, where accumulator i belongs, whether i + 1 belongs beside it) for every second one that has a place.
  template <typename F>
  __device__ void each_pair(const F& f) const {
#pragma unroll
    for (int i = 0; i < 128; i += 2) {
      const int offset = i / 4 * 8;
      if (offset < num_columns_[half_of(i)]) f(i, out_[half_of(i)] + offset, offset + 1 < num_columns_[half_of(i)]);
    }
  }

  const ScaledProduct& p_;
  const int warp_row_;
  float* out_[2];       // where the first accumulator of each row belongs
  int num_columns_[2];  // from there on
  float scale_[2];
};

namespace {

template <typename T, Depth kRows>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    head_product(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                 const __grid_constant__ int depth, const __grid_constant__ ScaledProduct p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const DealtTiles tiles(p.num_rows, p.num_columns);
  multiply_tiles<T, kRows, Depth::Across, Scaled>({{a, b, depth}}, a, tiles, p);
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
