// The fold of linear_q_values for sm_90a: what qrm_fast/triton/linear_q_values.py gives Hopper's 16-bit inputs to. A
// tile of the policy's logits and the same tile of Q stand in the accumulators that made them, 64 x 192 of each in a
// group of four warps, and are folded there against one another: no logit is rounded to 16 bits and none is written.
// 2 T (Dp + Dq) V FLOP, 24 bytes per row and split. Blocks, clusters and splits as in head_fold.cu; a split has 2112
// columns, cut from V alone. A row's bits depend on that row and the weights alone.
#include "head_fold.h"
#include "product_launch.h"

namespace qrm_fast {

constexpr int JOINT_COLUMNS = 192, JOINT_SPLIT = 11 * JOINT_COLUMNS;

struct QValuesFold {
  HeadLogits policy;
  const int64_t* targets;  // [T]
  float beta;
  float unit;            // Q times it is an exponent of 2
  float* sums;           // [6, splits, T]: max z, sums of e, (z - max) e, e Q; max Q / beta, sum of e^(Q / beta - max)
  float* target_logits;  // [2, T]: z and Q
};

// z of the target in row h of a lane, where it has that column, z being those from `column` on.
template <int kCount>
__device__ inline void store_target(const float (&z)[kCount], int h, int64_t target, int column, float* to) {
  if (target < column || target >= column + 2 * kCount) return;
  const int here = static_cast<int>(target) - column;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (half_of(i) == h && column_of(i) == here) *to = z[i];
  }
}

// The two rows of a lane through the tiles of one split. Maxima are the row's, sums those of the lane's columns.
class JointFold {
 public:
  using Parameters = QValuesFold;
  static constexpr bool kAdded = false;

  __device__ JointFold(const QValuesFold& p, const CUtensorMap&, int warp_row, uint32_t) : p_(p), warp_row_(warp_row) {}

  __device__ void begin(float (&)[JOINT_COLUMNS / 2], Tile) {}

  __device__ void end(float (&z)[JOINT_COLUMNS / 2], float (&q)[JOINT_COLUMNS / 2], Tile tile) {
    finish_logits(z, q, tile);
    float top[2] = {max_[0], max_[1]}, origin[2];
    row_tops(z, top, origin);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shift = sum_[h] == 0 ? 0 : max_[h] - top[h], scale = exp_fast(shift);
      weighted_[h] = scale * (weighted_[h] + shift * sum_[h]);
      sum_[h] *= scale;
      expected_[h] *= scale;
      max_[h] = top[h];
    }
#pragma unroll
    for (int i = 0; i < JOINT_COLUMNS / 2; ++i) {
      const int h = half_of(i);
      const float shift = z[i] - origin[h], e = exp_fast(shift);
      sum_[h] += e;
      weighted_[h] += e * fmaxf(shift, -1000.f);  // where e is 0 the shift may be -inf,
      expected_[h] += e == 0 ? 0 : e * q[i];      // and Q anything
    }
    float q_top[2] = {q_max_[0], q_max_[1]};
    row_tops(q, q_top, origin);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      q_sum_[h] *= exp2_fast(q_sum_[h] == 0 ? 0 : p_.unit * (q_max_[h] - q_top[h]));
      q_max_[h] = q_top[h];
    }
#pragma unroll
    for (int i = 0; i < JOINT_COLUMNS / 2; ++i) q_sum_[half_of(i)] += exp2_fast(p_.unit * (q[i] - origin[half_of(i)]));
    if (tile.column + JOINT_COLUMNS >= min((tile.column / JOINT_SPLIT + 1) * JOINT_SPLIT, p_.policy.vocab)) {
      store_sums(tile);
    }
  }

 private:
  __device__ int64_t row(Tile tile, int h) const { return first_row(tile.row + warp_row_) + 8 * h; }

  // Divided by the temperature, -inf past the last column; those of the target leave.
  __device__ void finish_logits(float (&z)[JOINT_COLUMNS / 2], float (&q)[JOINT_COLUMNS / 2], Tile tile) const {
    if (p_.policy.temperatures != nullptr) {
      divide_rows(z, {temperature_of(p_.policy, row(tile, 0)), temperature_of(p_.policy, row(tile, 1))});
    }
    end_columns(z, tile.column, p_.policy.vocab);
    end_columns(q, tile.column, p_.policy.vocab);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row(tile, h) >= p_.policy.num_rows) continue;
      float* to = p_.target_logits + row(tile, h);
      const int64_t target = p_.targets[row(tile, h)];
      store_target(z, h, target, tile.column, to);
      store_target(q, h, target, tile.column, to + p_.policy.num_rows);
    }
  }

  __device__ void store_sums(Tile tile) const {
    const int64_t split = tile.column / JOINT_SPLIT, splits = ceil_div(p_.policy.vocab, JOINT_SPLIT);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sums[] = {max_[h],
                            row_sum(sum_[h]),
                            row_sum(weighted_[h]),
                            row_sum(expected_[h]),
                            quotient(q_max_[h], p_.beta),
                            row_sum(q_sum_[h])};
      if (threadIdx.x % 4 != 0 || row(tile, h) >= p_.policy.num_rows) continue;
#pragma unroll
      for (int k = 0; k < 6; ++k) p_.sums[(k * splits + split) * p_.policy.num_rows + row(tile, h)] = sums[k];
    }
  }

  const QValuesFold& p_;
  const int warp_row_;
  float max_[2] = {-INFINITY, -INFINITY}, sum_[2] = {}, weighted_[2] = {}, expected_[2] = {};
  float q_max_[2] = {-INFINITY, -INFINITY}, q_sum_[2] = {};
};

namespace {

template <typename T>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    q_values_fold(const __grid_constant__ CUtensorMap policy_hidden, const __grid_constant__ CUtensorMap policy_weight,
                  const __grid_constant__ CUtensorMap q_hidden, const __grid_constant__ CUtensorMap q_weight,
                  const __grid_constant__ int policy_dim, const __grid_constant__ int q_dim,
                  const __grid_constant__ QValuesFold p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const SplitTiles<JOINT_COLUMNS, JOINT_SPLIT> tiles(p.policy.num_rows, p.policy.vocab);
  const Factors factors[] = {{policy_hidden, policy_weight, policy_dim}, {q_hidden, q_weight, q_dim}};
  multiply_tiles<T, Depth::Along, Depth::Along, JointFold>(factors, policy_hidden, tiles, p);
#else
  __trap();
#endif
}

// The arguments of linear_q_values_fold in qrm_fast/triton/linear_q_values.py, which see: contiguous but for the first
// four, whose rows start at multiples of 16 bytes.
void launch_q_values_fold(const Tensor& policy_hidden, const Tensor& policy_weight, const Tensor& q_hidden,
                          const Tensor& q_weight, const Tensor& targets, const std::optional<Tensor>& temperatures,
                          double beta, const Tensor& sums, const Tensor& target_logits) {
  const QValuesFold p{head_logits(policy_hidden, policy_weight, std::nullopt, temperatures, std::nullopt),
                      data<int64_t>(targets),
                      static_cast<float>(beta),
                      static_cast<float>(1.4426950408889634 / beta),
                      mutable_data<float>(sums),
                      mutable_data<float>(target_logits)};
  const int64_t splits = ceil_div(p.policy.vocab, JOINT_SPLIT);
  STD_TORCH_CHECK(sums.size(1) == splits, "a split of the vocabulary has ", JOINT_SPLIT, " columns");
  dispatch_halves(policy_hidden.scalar_type(), [&](auto half, CUtensorMapDataType dtype) {
    const auto rows = [&](const Tensor& x) { return factor_map(x, dtype, Depth::Along, TILE_ROWS); };
    const auto columns = [&](const Tensor& x) { return factor_map(x, dtype, Depth::Along, JOINT_COLUMNS / 2); };
    launch_product(q_values_fold<decltype(half)>, policy_hidden, p.policy.num_rows, splits, false, rows(policy_hidden),
                   columns(policy_weight), rows(q_hidden), columns(q_weight), static_cast<int>(policy_hidden.size(1)),
                   static_cast<int>(q_hidden.size(1)), p);
  });
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("q_values_fold", TORCH_BOX(&qrm_fast::launch_q_values_fold)); }
