// Policy-gradient loss, metrics and gradients in one pass over the rows: reads every [T] input once and writes the two
// gradients, 32 bytes per token in fp32 with every input given; nothing else of length T exists. Sums run in double
// over fixed blocks of rows and are combined in order, so their bits do not depend on the number of threads. gspo
// first reads logprobs, old_logprobs and weights for the mean of each sequence and keeps it in a value per row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cu_seqlens.h"
#include "dtypes.h"
#include "policy_sums.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;
template <typename T>
struct Rows {
  const T* logprobs;
  const acc_t<T>* advantages;
  const T* entropy;
  const T* old_logprobs;
  const T* ref_logprobs;
  const acc_t<T>* token_weights;
  acc_t<T> mean_weight;
  acc_t<T>* dlogprobs;
  acc_t<T>* dentropy;

  acc_t<T> weight(int64_t t) const { return token_weights ? token_weights[t] : mean_weight; }
  acc_t<T> old(int64_t t) const { return (old_logprobs ? old_logprobs : logprobs)[t]; }
};

// gspo's log s, in every row of its sequence.
template <typename T>
std::vector<acc_t<T>> sequence_log_ratios(const Rows<T>& rows, const CuSeqlens& cu, int64_t num_tokens) {
  std::vector<acc_t<T>> log_ratios(num_tokens);
  torch::stable::parallel_for(0, cu.num_sequences(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      MeanLogRatio mean;
      for (int64_t t = cu[s]; t < cu[s + 1]; ++t) {
        if (rows.weight(t) != 0) mean.add(static_cast<acc_t<T>>(rows.logprobs[t]) - rows.old(t));
      }
      std::fill(log_ratios.begin() + cu[s], log_ratios.begin() + cu[s + 1], static_cast<acc_t<T>>(mean.value()));
    }
  });
  return log_ratios;
}

// `log_ratios`: one per row for gspo, empty otherwise.
template <typename T>
PolicySums policy_block(const Rows<T>& rows, const std::vector<acc_t<T>>& log_ratios,
                        const PolicyOptions<acc_t<T>>& options, acc_t<T> entropy_coef, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  PolicySums sums;
  for (int64_t t = begin; t < end; ++t) {
    const A weight = rows.weight(t);
    if (weight == 0) {
      rows.dlogprobs[t] = 0;
      if (rows.entropy) rows.dentropy[t] = 0;
      continue;
    }
    const A logprob = rows.logprobs[t];
    const A log_ratio = log_ratios.empty() ? logprob - rows.old(t) : log_ratios[t];
    const A ref = rows.ref_logprobs ? static_cast<A>(rows.ref_logprobs[t]) : A(0);
    const A entropy = rows.entropy ? static_cast<A>(rows.entropy[t]) : A(0);
    const PolicyTerms<A> x = policy_terms<A>(logprob, rows.old(t), log_ratio, rows.ref_logprobs ? &ref : nullptr,
                                             rows.advantages[t], options);
    rows.dlogprobs[t] = weight * x.dlogprob;
    if (rows.entropy) rows.dentropy[t] = -entropy_coef * weight;
    sums.add_token(x, entropy, entropy_coef, weight);
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logprobs, const Tensor& advantages, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& token_weights, const std::optional<Tensor>& cu_seqlens, const std::string& kind,
    double clip_low, double clip_high, double dual_clip, double kl_coef, const std::string& kl_estimator,
    double entropy_coef) {
  const int64_t num_tokens = logprobs.size(0);
  const auto dtype = acc_dtype(logprobs.scalar_type());
  Tensor loss = torch::stable::new_empty(logprobs, {}, dtype);
  Tensor metrics = torch::stable::new_empty(logprobs, {kPolicyMetrics}, dtype);
  Tensor dlogprobs = torch::stable::new_empty(logprobs, {num_tokens}, dtype);
  Tensor dentropy = torch::stable::new_empty(logprobs, {entropy.has_value() ? num_tokens : 0}, dtype);
  dispatch_floating(logprobs.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto options = policy_options<A>(kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator);
    const Rows<T> rows{
        static_cast<const T*>(logprobs.const_data_ptr()),
        static_cast<const A*>(advantages.const_data_ptr()),
        data_or_null<T>(entropy),
        data_or_null<T>(old_logprobs),
        data_or_null<T>(ref_logprobs),
        data_or_null<A>(token_weights),
        static_cast<A>(1.0 / num_tokens),
        static_cast<A*>(dlogprobs.mutable_data_ptr()),
        static_cast<A*>(dentropy.mutable_data_ptr()),
    };
    std::vector<A> log_ratios;
    if (cu_seqlens) log_ratios = sequence_log_ratios(rows, CuSeqlens(*cu_seqlens, num_tokens), num_tokens);
    std::vector<PolicySums> blocks((num_tokens + kBlock - 1) / kBlock);
    torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        blocks[i] = policy_block<T>(rows, log_ratios, options, entropy_coef, i * kBlock,
                                    std::min((i + 1) * kBlock, num_tokens));
      }
    });
    PolicySums sums;
    for (const PolicySums& block : blocks) sums.add(block, 1);
    *static_cast<A*>(loss.mutable_data_ptr()) = sums.loss;
    std::copy_n(sums.metrics, kPolicyMetrics, static_cast<A*>(metrics.mutable_data_ptr()));
  });
  return {loss, metrics, dlogprobs, dentropy};
}

Tensor scaled_derivative(const Tensor& grad_loss, const Tensor& derivative, const Tensor& x) {
  Tensor grad = torch::stable::new_empty(x, x.sizes());
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const A scale = *static_cast<const A*>(grad_loss.const_data_ptr());
    const A* d = static_cast<const A*>(derivative.const_data_ptr());
    T* g = static_cast<T*>(grad.mutable_data_ptr());
    torch::stable::parallel_for(0, x.numel(), 32768, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) g[t] = static_cast<T>(scale * d[t]);
    });
  });
  return grad;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&qrm_fast::policy_loss));
  m.impl("scaled_derivative", TORCH_BOX(&qrm_fast::scaled_derivative));
}
