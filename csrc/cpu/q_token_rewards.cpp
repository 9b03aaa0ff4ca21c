// Token rewards from Q-RM scores, given the statistics: normalise, re-score the last action, subtract the KL penalty,
// mask, in one pass. Reads q, the mask and, with a penalty, both log-probabilities once, writes the rewards once: 9 to
// 17 bytes per token in fp32. Arithmetic is in double and rounded once. Sequences run in parallel and are summed from
// their own start.
#include "q_token_rewards.h"

#include <string>

#include "../dtypes.h"
#include "moments.h"
#include "packed/cu_seqlens.h"
#include "parallel.h"

namespace qrm_fast {
namespace {

Tensor q_token_rewards(const Tensor& q, const Tensor& cu_seqlens, const Tensor& stats,
                       const std::optional<Tensor>& mask, bool center, bool rescore_last,
                       const std::optional<Tensor>& logprobs, const std::optional<Tensor>& ref_logprobs, double kl_coef,
                       std::string kl_estimator, double min_std, double eps) {
  const CuSeqlens cu(cu_seqlens, q.size(0));
  const bool joint = stats.size(0) == 1;
  STD_TORCH_CHECK(joint || stats.size(0) == cu.num_sequences(), "moments are of the batch or of every sequence");
  const Moments* sets = data<Moments>(stats);
  const KlEstimator estimator = kl_estimator_of(kl_estimator);
  Tensor rewards = torch::stable::new_empty(q, {q.size(0)}, acc_dtype(q.scalar_type()));
  dispatch_floating(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* x = data<T>(q);
    const bool* m = data_or_null<bool>(mask);
    const Penalty<T> penalty{data_or_null<acc_t<T>>(logprobs), data_or_null<acc_t<T>>(ref_logprobs), estimator,
                             kl_coef};
    acc_t<T>* r = mutable_data<acc_t<T>>(rewards);
    parallel(cu.num_sequences(), [&](int64_t i) {
      const Moments& set = sets[joint ? 0 : i];
      sequence_rewards(x, m, cu[i], cu[i + 1], center ? set.mean : 0, inverse_spread(set, min_std, eps), rescore_last,
                       penalty, [&](int64_t t, double reward) { r[t] = reward; });
    });
  });
  return rewards;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("q_token_rewards", TORCH_BOX(&qrm_fast::q_token_rewards)); }
