// linear_logprobs_partial: the forward pass of linear_logprobs over one shard of the vocabulary, without its last step.
// Same product, fold and order, hence the same bits for the same columns. Ignored rows are never read.

#include "head/fold.h"

namespace qrm_fast {
namespace {

// The ids as columns of this shard, -1 where they are none.
Tensor local_targets(const Tensor& targets, int64_t vocab_start, int64_t vocab) {
  Tensor local = torch::stable::new_empty(targets, targets.sizes());
  const int64_t* id = data<int64_t>(targets);
  int64_t* out = mutable_data<int64_t>(local);
  for (int64_t t = 0; t < targets.numel(); ++t) {
    const bool here = id[t] >= vocab_start && id[t] - vocab_start < vocab;
    out[t] = here ? id[t] - vocab_start : -1;
  }
  return local;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprobs_partial(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t vocab_start,
    const std::optional<Tensor>& bias, double temperature, const std::optional<Tensor>& temperatures,
    std::optional<double> softcap, int64_t ignore_index) {
  const HeadOptions options{bias, temperature, temperatures, softcap, ignore_index};
  const Tensor columns = local_targets(targets, vocab_start, weight.size(0));
  const int64_t* ids = data<int64_t>(targets);
  Tensor outputs[4];
  for (Tensor& x : outputs) {
    x = torch::stable::new_empty(hidden, {hidden.size(0)}, acc_dtype(hidden.scalar_type()));
  }
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using S = acc_t<In>;
    Head<In, S> head(hidden, weight, columns, options);
    for (int64_t t = 0; t < hidden.size(0); ++t) {
      if (ids[t] != ignore_index) head.rows.push_back(t);
    }
    const FoldedRows<S> folded = fold_rows(head);
    S* out[4];
    for (int i = 0; i < 4; ++i) out[i] = mutable_data<S>(outputs[i]);
    const auto store = [&](int64_t t, const SoftmaxStats<S>& stats, S target_logit) {
      out[0][t] = stats.max;
      out[1][t] = stats.sum;
      out[2][t] = stats.weighted;
      out[3][t] = target_logit;
    };
    for (int64_t t = 0; t < hidden.size(0); ++t) {
      store(t, SoftmaxStats<S>::empty(), std::numeric_limits<S>::quiet_NaN());
    }
    for (size_t i = 0; i < head.rows.size(); ++i) store(head.rows[i], folded.total(i), folded.target_logits[i]);
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("linear_logprobs_partial", TORCH_BOX(&qrm_fast::linear_logprobs_partial));
}
