// Token rewards from Q-RM scores, given the statistics: normalise, re-score the last action, subtract the KL penalty,
// mask, in one pass. Reads q, the mask and, with a penalty, both log-probabilities once, writes the rewards once: 9 to
// 17 bytes per token in fp32. Arithmetic is in double and rounded once. Sequences run in parallel and are summed from
// their own start.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "cu_seqlens.h"
#include "dtypes.h"
#include "moments.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

enum class Estimator { abs, k1, k2, k3 };

Estimator estimator_of(const std::string& name) {
  if (name == "abs") return Estimator::abs;
  if (name == "k1") return Estimator::k1;
  if (name == "k2") return Estimator::k2;
  STD_TORCH_CHECK(name == "k3", "the public function admits only known estimators");
  return Estimator::k3;
}

template <typename T>
struct Penalty {
  const acc_t<T>* logprobs;  // nullptr: none
  const acc_t<T>* ref_logprobs;
  Estimator estimator;
  double coef;

  double operator()(int64_t t) const {
    if (logprobs == nullptr) return 0;
    const double d = static_cast<double>(logprobs[t]) - ref_logprobs[t];
    switch (estimator) {
      case Estimator::abs:
        return coef * std::abs(d);
      case Estimator::k1:
        return coef * d;
      case Estimator::k2:
        return coef * (d * d / 2);
      case Estimator::k3:
        return coef * (std::expm1(-d) + d);
    }
    return 0;
  }
};

template <typename T>
void sequence_rewards(const T* q, const bool* mask, int64_t bos, int64_t eos, double shift, double scale,
                      bool rescore_last, const Penalty<T>& penalty, acc_t<T>* rewards) {
  double sum = 0;
  int64_t count = 0, last = -1;
  for (int64_t t = bos; t < eos; ++t) {
    if (mask != nullptr && !mask[t]) {
      rewards[t] = 0;
      continue;
    }
    const double y = (static_cast<double>(static_cast<acc_t<T>>(q[t])) - shift) * scale;
    sum += y;
    ++count;
    last = t;
    rewards[t] = y - penalty(t);
  }
  if (rescore_last && count > 0) rewards[last] = sum / count - penalty(last);
}

Tensor q_token_rewards(const Tensor& q, const Tensor& cu_seqlens, const Tensor& stats,
                       const std::optional<Tensor>& mask, bool center, bool rescore_last,
                       const std::optional<Tensor>& logprobs, const std::optional<Tensor>& ref_logprobs, double kl_coef,
                       std::string kl_estimator, double min_std, double eps) {
  const CuSeqlens cu(cu_seqlens, q.size(0));
  const bool joint = stats.size(0) == 1;
  STD_TORCH_CHECK(joint || stats.size(0) == cu.num_sequences(), "moments are of the batch or of every sequence");
  const Moments* sets = static_cast<const Moments*>(stats.const_data_ptr());
  const Estimator estimator = estimator_of(kl_estimator);
  Tensor rewards = torch::stable::new_empty(q, {q.size(0)}, acc_dtype(q.scalar_type()));
  dispatch_floating(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(q.const_data_ptr());
    const bool* m = data_or_null<bool>(mask);
    const Penalty<T> penalty{data_or_null<acc_t<T>>(logprobs), data_or_null<acc_t<T>>(ref_logprobs), estimator,
                             kl_coef};
    acc_t<T>* r = static_cast<acc_t<T>*>(rewards.mutable_data_ptr());
    torch::stable::parallel_for(0, cu.num_sequences(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Moments& set = sets[joint ? 0 : i];
        const double sigma = std::max(std::sqrt(set.m2 / std::max(set.count, 1.0)), min_std);
        const double scale = sigma != 0 ? 1 / (sigma + eps) : 0;
        sequence_rewards(x, m, cu[i], cu[i + 1], center ? set.mean : 0, scale, rescore_last, penalty, r);
      }
    });
  });
  return rewards;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("q_token_rewards", TORCH_BOX(&qrm_fast::q_token_rewards)); }
