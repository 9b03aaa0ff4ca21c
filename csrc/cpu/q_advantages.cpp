// Advantages and returns from Q-RM scores in one pass: token rewards as q_token_rewards forms them, minus the scaled
// values of a critic. Reads q, the values, the mask and, with a penalty, both log-probabilities once and writes both
// results once: 16 to 25 bytes per token in fp32. Where the statistics are those of each sequence it is the only pass:
// a sequence is in cache when it is normalised. Statistics of the batch or of groups are given. Arithmetic is in double
// and rounded once; sequences run in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>

#include "../dtypes.h"
#include "moments.h"
#include "packed/cu_seqlens.h"
#include "q_token_rewards.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

// The statistics of a sequence: given for the batch or for every sequence, else its own.
template <typename T>
struct Statistics {
  const Moments* given;  // or null
  bool joint;
  const T* x;
  const bool* mask;
  const CuSeqlens& cu;

  Moments operator()(int64_t i) const {
    if (given != nullptr) return given[joint ? 0 : i];
    return row_moments(x + cu[i], mask ? mask + cu[i] : nullptr, cu[i + 1] - cu[i]);
  }
};

std::tuple<Tensor, Tensor> q_advantages(const Tensor& q, const std::optional<Tensor>& values, const Tensor& cu_seqlens,
                                        const std::optional<Tensor>& stats, const std::optional<Tensor>& value_stats,
                                        const std::optional<Tensor>& mask, double value_coef, bool value_normalize,
                                        bool center, bool rescore_last, const std::optional<Tensor>& logprobs,
                                        const std::optional<Tensor>& ref_logprobs, double kl_coef,
                                        std::string kl_estimator, double min_std, double eps) {
  const CuSeqlens cu(cu_seqlens, q.size(0));
  const bool joint = stats.has_value() && stats->size(0) == 1;
  STD_TORCH_CHECK(joint || !stats.has_value() || stats->size(0) == cu.num_sequences(),
                  "moments are of the batch or of every sequence");
  const Estimator estimator = estimator_of(kl_estimator);
  const auto dtype = acc_dtype(q.scalar_type());
  Tensor advantages = torch::stable::new_empty(q, {q.size(0)}, dtype);
  Tensor returns = torch::stable::new_empty(q, {q.size(0)}, dtype);
  dispatch_floating(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(q.const_data_ptr());
    const T* v = data_or_null<T>(values);
    const bool* m = data_or_null<bool>(mask);
    const Penalty<T> penalty{data_or_null<acc_t<T>>(logprobs), data_or_null<acc_t<T>>(ref_logprobs), estimator,
                             kl_coef};
    const Statistics<T> of_q{data_or_null<Moments>(stats), joint, x, m, cu};
    const Statistics<T> of_values{data_or_null<Moments>(value_stats), joint, v, m, cu};
    acc_t<T>* a = static_cast<acc_t<T>*>(advantages.mutable_data_ptr());
    acc_t<T>* r = static_cast<acc_t<T>*>(returns.mutable_data_ptr());
    torch::stable::parallel_for(0, cu.num_sequences(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Moments set = of_q(i);
        double value_scale = v != nullptr ? value_coef : 0;
        if (v != nullptr && value_normalize) value_scale *= inverse_spread(of_values(i), 0, eps);
        sequence_rewards(x, m, cu[i], cu[i + 1], center ? set.mean : 0, inverse_spread(set, min_std, eps), rescore_last,
                         penalty, [&](int64_t t, double reward) {
                           const bool counts = v != nullptr && (m == nullptr || m[t]);
                           r[t] = reward;
                           a[t] = counts ? reward - value_scale * static_cast<acc_t<T>>(v[t]) : reward;
                         });
      }
    });
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("q_advantages", TORCH_BOX(&qrm_fast::q_advantages)); }
