// Policy-gradient loss, metrics and gradients in one pass over the rows: reads every [T] input once and writes the two
// gradients, 32 bytes per token in fp32 with every input given; nothing else of length T exists. Terms are in double, a
// token per lane, and rounded once. Sums run in double over fixed lanes of fixed blocks of rows and are combined in
// order, so their bits do not depend on the number of threads. gspo first reads logprobs, old_logprobs and weights for
// the mean of each sequence and keeps it in a value per row.

#include <algorithm>
#include <string>
#include <vector>

#include "../dtypes.h"
#include "memory.h"
#include "packed/cu_seqlens.h"
#include "policy_sums.h"
#include "simd/lanes.h"

namespace qrm_fast {
namespace {

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
  parallel(cu.num_sequences(), [&](int64_t s) {
    MeanLogRatio mean;
    for (int64_t t = cu[s]; t < cu[s + 1]; ++t) {
      if (rows.weight(t) != 0) mean.add(static_cast<acc_t<T>>(rows.logprobs[t]) - rows.old(t));
    }
    std::fill(log_ratios.begin() + cu[s], log_ratios.begin() + cu[s + 1], static_cast<acc_t<T>>(mean.value()));
  });
  return log_ratios;
}

// `kDouble`: the rows are double too.
template <int Bytes, bool kDouble>
struct VectorMath : Lanes<Bytes> {
  using Base = Lanes<Bytes>;
  using typename Base::Vec;

  QRM_FAST_INLINE static Vec exp_bounded(Vec x) { return Base::where_equal(x, x, Base::exp_in_range(x), x); }

  // Of float rows e^x - 1 has digits enough; of double rows x + x^2 / 2 + ... where it would cancel.
  QRM_FAST_INLINE static Vec expm1(Vec x, Vec exp_x) {
    const Vec far = exp_x - 1;
    if constexpr (!kDouble) return far;
    Vec series = {};
#pragma GCC unroll 12
    for (int i = 12; i > 0; --i) series = (series + 1) * (x * (1.0 / i));
    const Vec size = Base::where_less(x, Vec{}, -x, x);
    return Base::where_less(size, Base::broadcast(0.2), series, far);
  }
};

// Rows [begin, end). `log_ratios`: one per row for gspo (kSequence), else null; the token's own ratio then needs no
// exponential of its own.
template <int Bytes, bool kSequence, typename T>
QRM_FAST_INLINE PolicySums policy_rows(const Rows<T>& rows, const acc_t<T>* log_ratios,
                                       const PolicyOptions<double>& options, double entropy_coef, int64_t begin,
                                       int64_t end) {
  using L = VectorMath<Bytes, std::is_same_v<T, double>>;
  using V = typename L::Vec;
  const PolicyOptions<V> o{options.kind,
                           L::broadcast(options.ratio_low),
                           L::broadcast(options.ratio_high),
                           L::broadcast(options.dual_clip),
                           L::broadcast(options.kl_coef),
                           options.has_kl,
                           options.kl_estimator};
  acc_t<T> mean_weights[L::kLanes];
  std::fill_n(mean_weights, L::kLanes, rows.mean_weight);
  V sums[kPolicyMetrics] = {}, top = {};
  const auto add = [&](int64_t t, int64_t count) __attribute__((always_inline)) {
    const V weight = L::load_first(rows.token_weights ? rows.token_weights + t : mean_weights, count);
    const auto load = [&](const auto* p) __attribute__((always_inline)) {
      return L::where_equal(weight, V{}, V{}, L::load_first(p + t, count));
    };
    const V logprob = load(rows.logprobs), advantage = load(rows.advantages);
    const V old = rows.old_logprobs ? load(rows.old_logprobs) : logprob;
    const V log_ratio = kSequence ? load(log_ratios) : logprob - old;
    const V ref = rows.ref_logprobs ? load(rows.ref_logprobs) : V{};
    const V entropy = rows.entropy ? load(rows.entropy) : V{};
    const auto x = policy_terms<V, L>(logprob, old, log_ratio, rows.ref_logprobs ? &ref : nullptr, advantage, o);
    L::store_first(rows.dlogprobs + t, count, weight * x.dlogprob);
    if (rows.entropy) L::store_first(rows.dentropy + t, count, -entropy_coef * weight);
    const V loss = entropy_coef != 0 ? x.loss - entropy_coef * entropy : x.loss;
    const V terms[] = {loss, x.clipped_low, x.clipped_high, x.approx_kl, x.ref_kl, x.ratio, entropy};
    for (int i = 0; i < kPolicyMetrics; ++i) sums[i] += weight * terms[i];
    const V ratio = L::where_equal(weight, V{}, V{}, x.ratio);
    top = L::where_equal(ratio, ratio, L::where_less(top, ratio, ratio, top), ratio);  // a NaN stays
  };
  int64_t t = begin;
  for (; t + L::kLanes <= end; t += L::kLanes) add(t, L::kLanes);  // whose loads have a fixed size
  if (t < end) add(t, end - t);
  PolicySums total;
  total.loss = L::sum(sums[0]);
  for (int i = 0; i < kPolicyMetrics - 1; ++i) total.metrics[i] = L::sum(sums[i + 1]);
  for (int i = 0; i < L::kLanes; ++i) total.raise(top[i]);
  return total;
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
  Tensor dlogprobs = fresh_rows(logprobs, num_tokens);
  Tensor dentropy = fresh_rows(logprobs, entropy.has_value() ? num_tokens : 0);
  dispatch_floating(logprobs.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto options = policy_options<double>(kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator);
    const Rows<T> rows{
        data<T>(logprobs),
        data<A>(advantages),
        data_or_null<T>(entropy),
        data_or_null<T>(old_logprobs),
        data_or_null<T>(ref_logprobs),
        data_or_null<A>(token_weights),
        static_cast<A>(1.0 / num_tokens),
        mutable_data<A>(dlogprobs),
        mutable_data<A>(dentropy),
    };
    std::vector<A> log_ratios;
    if (cu_seqlens) log_ratios = sequence_log_ratios(rows, CuSeqlens(*cu_seqlens, num_tokens), num_tokens);
    static const auto sum_tokens =
        widest([](auto bytes) { return Compiled<bytes, policy_rows<bytes, false, T>>::run; });
    static const auto sum_tokens_of_sequences =
        widest([](auto bytes) { return Compiled<bytes, policy_rows<bytes, true, T>>::run; });
    const auto sum_rows = cu_seqlens ? sum_tokens_of_sequences : sum_tokens;
    std::vector<PolicySums> blocks(ceil_div(num_tokens, kBlock));
    parallel(blocks.size(), [&](int64_t i) {
      blocks[i] =
          sum_rows(rows, log_ratios.data(), options, entropy_coef, i * kBlock, std::min((i + 1) * kBlock, num_tokens));
    });
    PolicySums sums;
    for (const PolicySums& block : blocks) sums.add(block, 1);
    *mutable_data<A>(loss) = sums.loss;
    std::copy_n(sums.metrics, kPolicyMetrics, mutable_data<A>(metrics));
  });
  return {loss, metrics, dlogprobs, dentropy};
}

Tensor scaled_derivative(const Tensor& grad_loss, const Tensor& derivative, const Tensor& x) {
  Tensor grad = in_huge_pages(torch::stable::new_empty(x, x.sizes()));
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const A scale = *data<A>(grad_loss);
    const A* d = data<A>(derivative);
    T* g = mutable_data<T>(grad);
    parallel(x.numel(), 32768, [&](int64_t t) { g[t] = static_cast<T>(scale * d[t]); });
  });
  return grad;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&qrm_fast::policy_loss));
  m.impl("scaled_derivative", TORCH_BOX(&qrm_fast::scaled_derivative));
}
