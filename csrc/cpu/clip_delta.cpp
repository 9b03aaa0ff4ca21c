// Clip and Delta of step rewards: reads and writes every step once, 8 bytes per step in fp32. Sequences run in
// parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "packed/cu_seqlens.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

template <typename T>
void shape_steps(const T* rewards, int64_t n, double eta, bool clip, bool delta, acc_t<T>* shaped) {
  const auto clipped = [&](int64_t k) {
    const acc_t<T> reward = rewards[k];
    const acc_t<T> excess = reward - static_cast<acc_t<T>>(eta);
    return !clip ? reward : excess > 0 ? acc_t<T>(0) : excess;
  };
  for (int64_t k = 0; k < n; ++k) {
    shaped[k] = !delta || k == n - 2 ? clipped(k) : k == n - 1 ? 0 : clipped(k) - clipped(k + 1);
  }
}

Tensor clip_delta(const Tensor& step_rewards, const Tensor& step_cu, double eta, bool clip, bool delta) {
  const int64_t num_steps = step_rewards.size(0);
  const CuSeqlens cu(step_cu, num_steps, "step_cu");
  Tensor shaped = torch::stable::new_empty(step_rewards, {num_steps}, acc_dtype(step_rewards.scalar_type()));
  dispatch_floating(step_rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* r = static_cast<const T*>(step_rewards.const_data_ptr());
    acc_t<T>* s = static_cast<acc_t<T>*>(shaped.mutable_data_ptr());
    torch::stable::parallel_for(0, cu.num_sequences(), 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) shape_steps(r + cu[i], cu[i + 1] - cu[i], eta, clip, delta, s + cu[i]);
    });
  });
  return shaped;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("clip_delta", TORCH_BOX(&qrm_fast::clip_delta)); }
