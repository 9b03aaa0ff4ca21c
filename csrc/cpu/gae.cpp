// Generalised advantage estimation over packed sequences, one reverse pass per sequence.
// Reads rewards and values once, writes advantages and returns once: 16 bytes per token in fp32. The recurrence is
// carried in double, which costs no time beside its latency, and every row is rounded once. Sequences run in parallel,
// so a row's bits depend on its own sequence only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cu_seqlens.h"
#include "dtypes.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

template <typename T>
void gae_sequence(const T* rewards, const T* values, const bool* mask, int64_t bos, int64_t eos, double gamma,
                  double decay, double bootstrap, acc_t<T>* advantages, acc_t<T>* returns) {
  double next_value = bootstrap;
  double advantage = 0;
  for (int64_t t = eos - 1; t >= bos; --t) {
    if (mask != nullptr && !mask[t]) {
      advantages[t] = 0;
      returns[t] = 0;
      continue;
    }
    const double reward = static_cast<acc_t<T>>(rewards[t]);
    const double value = static_cast<acc_t<T>>(values[t]);
    // A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}
    advantage = reward + gamma * next_value - value + decay * advantage;
    next_value = value;
    advantages[t] = advantage;
    returns[t] = advantage + value;
  }
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double gamma,
                               double lam, const std::optional<Tensor>& lam_per_sequence,
                               const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const int64_t num_tokens = rewards.size(0);
  const CuSeqlens cu(cu_seqlens, num_tokens);
  const auto dtype = acc_dtype(rewards.scalar_type());
  Tensor advantages = torch::stable::new_empty(rewards, {num_tokens}, dtype);
  Tensor returns = torch::stable::new_empty(rewards, {num_tokens}, dtype);
  dispatch_floating(rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* r = static_cast<const T*>(rewards.const_data_ptr());
    const T* v = static_cast<const T*>(values.const_data_ptr());
    const bool* m = data_or_null<bool>(mask);
    const acc_t<T>* lams = data_or_null<acc_t<T>>(lam_per_sequence);
    const acc_t<T>* boot = data_or_null<acc_t<T>>(bootstrap);
    acc_t<T>* a = static_cast<acc_t<T>*>(advantages.mutable_data_ptr());
    acc_t<T>* g = static_cast<acc_t<T>*>(returns.mutable_data_ptr());
    torch::stable::parallel_for(0, cu.num_sequences(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        gae_sequence<T>(r, v, m, cu[i], cu[i + 1], gamma, gamma * (lams ? lams[i] : lam), boot ? boot[i] : 0, a, g);
      }
    });
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("gae", TORCH_BOX(&qrm_fast::gae)); }
