// dZ of a vocabulary head for sm_90a: what qrm_fast/triton/linear_logprobs_backward.py gives Hopper's 16-bit inputs to.
// The logits are multiplied again, and a tile of them leaves the accumulators as dZ divided by its row's scale, rounded
// to hidden's dtype. 2 T D V FLOP; clusters of two blocks stay and take one tile of 256 x 256 after the other.
#include "head_logits.h"
#include "product_launch.h"

namespace qrm_fast {

struct HeadGradient {
  HeadLogits head;         // of these columns
  const int64_t* targets;  // [T]
  const float* factors;    // scale, g, a, e of each row, `stride` apart
  int64_t stride;
  const float* lse;      // [T]
  int64_t first_column;  // of the vocabulary
};

// g 1[v = target] - p (a + e log p), p = exp(z - lse), times the softcap's slope: `gradient` of the Triton kernels.
template <typename T>
class Gradient {
 public:
  using Parameters = HeadGradient;
  static constexpr bool kAdded = false;

  __device__ Gradient(const HeadGradient& p, const CUtensorMap& dz, int warp_row, uint32_t boxes)
      : p_(p), dz_(dz), warp_row_(warp_row), boxes_(boxes) {}

  __device__ void begin(float (&)[128], Tile tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row(tile.row + warp_row_) + 8 * h;
      const bool inside = row < p_.head.num_rows;
      const auto factor = [&](int k) { return inside ? p_.factors[k * p_.stride + row] : 0; };
      const int64_t here = inside ? p_.targets[row] - p_.first_column - tile.column : -1;
      here_[h] = here >= 0 && here < TILE_COLUMNS ? static_cast<int>(here) : -1;
      temperature_[h] = temperature_of(p_.head, row);
      active_[h] = factor(0) > 0;
      g_[h] = factor(1);
      a_[h] = factor(2);
      e_[h] = factor(3);
      lse_[h] = inside ? p_.lse[row] : 0;
    }
  }

  __device__ void end(float (&z)[128], Tile tile) {
    finish_logits<T>(p_.head, z, tile.column, temperature_);
    if (p_.head.softcap != 0) {
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        const float y = quotient(z[i], p_.head.softcap) * temperature_[half_of(i)];
        z[i] = gradient(z[i], i) * fmaf(-y, y, 1.f);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 128; ++i) z[i] = gradient(z[i], i);
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) z[i] = active_[half_of(i)] ? z[i] : 0;
    store_tile<T>(dz_, z, tile.row + warp_row_, tile.column, boxes_);
  }

 private:
  // Before the softcap's slope.
  __device__ float gradient(float z, int i) const {
    const int h = half_of(i);
    const float logp = z - lse_[h];
    // where p is 0 its logarithm may be -inf
    const float slope = fmaf(e_[h], fmaxf(logp, -1000.f), a_[h]);
    return fmaf(-exp_fast(logp), slope, column_of(i) == here_[h] ? g_[h] : 0);
  }

  const HeadGradient& p_;
  const CUtensorMap& dz_;
  const int warp_row_;
  const uint32_t boxes_;
  int here_[2];
  bool active_[2];
  float temperature_[2], g_[2], a_[2], e_[2], lse_[2];
};

namespace {

template <typename T>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    head_dz(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
            const __grid_constant__ CUtensorMap dz, const __grid_constant__ int dim,
            const __grid_constant__ HeadGradient p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const DealtTiles tiles(p.head.num_rows, p.head.vocab);
  multiply_tiles<T, Depth::Along, Depth::Along, Gradient<T>>({{hidden, weight, dim}}, dz, tiles, p);
#else
  __trap();
#endif
}

// weight, bias and dz: of the columns from first_column on. factors: as store_factors of the Triton kernels has them.
void launch_dz(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& temperatures, std::optional<double> softcap, const Tensor& factors,
               const Tensor& lse, int64_t first_column, const Tensor& dz) {
  const HeadGradient p{head_logits(hidden, weight, bias, temperatures, softcap),
                       data<int64_t>(targets),
                       data<float>(factors),
                       factors.stride(0),
                       data<float>(lse),
                       first_column};
  dispatch_halves(hidden.scalar_type(), [&](auto half, CUtensorMapDataType dtype) {
    launch_product(head_dz<decltype(half)>, hidden, p.head.num_rows, ceil_div(p.head.vocab, TILE_COLUMNS), true,
                   factor_map(hidden, dtype, Depth::Along, TILE_ROWS),
                   factor_map(weight, dtype, Depth::Along, TILE_COLUMNS / 2), tensor_map(dz, dtype, WARP_ROWS),
                   static_cast<int>(hidden.size(1)), p);
  });
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("head_dz", TORCH_BOX(&qrm_fast::launch_dz)); }
