// Differences of a prover's values along the steps of each sequence: reads and writes every step once, 8 bytes per step
// in fp32. Sequences run in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "packed/cu_seqlens.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

Tensor progress_rewards(const Tensor& values_after, const Tensor& start_values, const Tensor& step_cu, double alpha) {
  const int64_t num_steps = values_after.size(0);
  const CuSeqlens cu(step_cu, num_steps, "step_cu");
  Tensor rewards = torch::stable::new_empty(values_after, {num_steps}, acc_dtype(values_after.scalar_type()));
  dispatch_floating(values_after.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* after = static_cast<const T*>(values_after.const_data_ptr());
    const T* start = static_cast<const T*>(start_values.const_data_ptr());
    A* r = static_cast<A*>(rewards.mutable_data_ptr());
    torch::stable::parallel_for(0, cu.num_sequences(), 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        A before = start[i];
        for (int64_t k = cu[i]; k < cu[i + 1]; ++k) {
          const A value = after[k];
          r[k] = static_cast<A>(alpha) * (value - before);
          before = value;
        }
      }
    });
  });
  return rewards;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("progress_rewards", TORCH_BOX(&qrm_fast::progress_rewards)); }
