// Rewards of a two-class process reward model: reads two logits and writes one number per step. In double, rounded
// once: there are some 40 times fewer steps than tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../dtypes.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

Tensor prm_rewards(const Tensor& logits) {
  const int64_t num_steps = logits.size(0), stride = logits.stride(0);
  Tensor rewards = torch::stable::new_empty(logits, {num_steps}, acc_dtype(logits.scalar_type()));
  dispatch_floating(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* z = static_cast<const T*>(logits.const_data_ptr());
    acc_t<T>* r = static_cast<acc_t<T>*>(rewards.mutable_data_ptr());
    torch::stable::parallel_for(0, num_steps, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const double wrong = static_cast<acc_t<T>>(z[k * stride]), right = static_cast<acc_t<T>>(z[k * stride + 1]);
        r[k] = std::tanh((right - wrong) / 2);
      }
    });
  });
  return rewards;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("prm_rewards", TORCH_BOX(&qrm_fast::prm_rewards)); }
