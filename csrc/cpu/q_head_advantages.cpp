// Hidden states to advantages: the scalar Q-head of token_q and the per-sequence rewards of q_token_rewards in one
// call. Reads each hidden row once, 2 D bytes in bf16 for 2 D FLOP: bound by memory; q lives in the result's
// memory until it is normalised. The head runs over rows in parallel, the normalisation over sequences, both with the
// bits of the two ops: a row's bits depend on its sequence only.

#include <algorithm>

#include "../dtypes.h"
#include "moments.h"
#include "packed/cu_seqlens.h"
#include "parallel.h"
#include "q_token_rewards.h"
#include "token_q.h"

namespace qrm_fast {
namespace {

Tensor q_head_advantages(const Tensor& hidden, const Tensor& head, const Tensor& cu_seqlens,
                         const std::optional<Tensor>& mask, bool center, bool rescore_last, double min_std,
                         double eps) {
  const int64_t num_tokens = hidden.size(0), dim = hidden.size(1), stride = hidden.stride(0);
  const CuSeqlens cu(cu_seqlens, num_tokens);
  Tensor advantages = torch::stable::new_empty(hidden, {num_tokens}, acc_dtype(hidden.scalar_type()));
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* h = data<T>(hidden);
    const T* w = data<T>(head);
    const bool* m = data_or_null<bool>(mask);
    A* a = mutable_data<A>(advantages);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1));
    parallel(num_tokens, grain,
             [&](int64_t t) { a[t] = m != nullptr && !m[t] ? A(0) : row_dot(h + t * stride, w, dim); });
    const Penalty<A> none{nullptr, nullptr, KlEstimator::kAbs, 0};
    parallel(cu.num_sequences(), [&](int64_t i) {
      const Moments set = row_moments(a + cu[i], m ? m + cu[i] : nullptr, cu[i + 1] - cu[i]);
      sequence_rewards(a, m, cu[i], cu[i + 1], center ? set.mean : 0, inverse_spread(set, min_std, eps), rescore_last,
                       none, [&](int64_t t, double reward) { a[t] = reward; });
    });
  });
  return advantages;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("q_head_advantages", TORCH_BOX(&qrm_fast::q_head_advantages)); }
