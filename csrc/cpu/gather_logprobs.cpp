// gather_logprobs: log_softmax(logits) at the targets, and its entropy.
//
// Forward reads the logits once, in chunks that stay in L1 while they are widened to float (double), finished (softcap,
// temperature) and folded into the row's (max, sum, weighted sum); chunks are cut from V only and merged in order.
// Backward reads them once more and writes dlogits once: 2 x 2 T V bytes in bf16. A row is one unit of work, so its
// bits depend on nothing else. Rows that are ignored, or without upstream gradient, are never read.

#include "head/fold.h"
#include "memory.h"

namespace qrm_fast {
namespace {

constexpr int64_t kColumns = 2048;  // of one chunk, 8 KB in float

template <typename In, typename S = acc_t<In>>
class LogitRows {
 public:
  LogitRows(const Tensor& logits, const Tensor& targets, const HeadOptions& options)
      : num_rows(logits.size(0)),
        vocab(logits.size(1)),
        logits_(data<In>(logits)),
        stride_(logits.stride(0)),
        targets_(data<int64_t>(targets)),
        temperatures_(data_or_null<S>(options.temperatures)),
        temperature_(S(options.temperature)),
        softcap_(S(options.softcap.value_or(0))),
        ignore_index_(options.ignore_index),
        kernels_(head_kernels<S>()) {
    for (int64_t t = 0; t < num_rows; ++t) {
      CHECK_VALUE(ignored(t) || (targets_[t] >= 0 && targets_[t] < vocab), "targets must be in [0, ", vocab, ") or ",
                  ignore_index_, ", got ", targets_[t], " at row ", t);
    }
  }

  bool ignored(int64_t t) const { return targets_[t] == ignore_index_; }

  RowResult<S> forward(int64_t t) const {
    const LogitTransform<S> transform = transform_of(t);
    const In* row = logits_ + t * stride_;
    const int64_t target = targets_[t];
    SoftmaxStats<S> stats = SoftmaxStats<S>::empty();
    S target_logit = 0;
    alignas(64) S buffer[kColumns];
    for (int64_t column = 0; column < vocab; column += kColumns) {
      const int64_t width = std::min(kColumns, vocab - column);
      const S* z = finished(row + column, width, transform, buffer);
      if (target >= column && target < column + width) target_logit = z[target - column];
      stats.merge(kernels_.fold(z, width));
    }
    return RowResult<S>(stats, target_logit);
  }

  void backward(int64_t t, const RowGradient<S>& gradient, In* out) const {
    const LogitTransform<S> transform = transform_of(t);
    const In* row = logits_ + t * stride_;
    const int64_t target = targets_[t];
    alignas(64) S dz[kColumns];
    for (int64_t column = 0; column < vocab; column += kColumns) {
      const int64_t width = std::min(kColumns, vocab - column);
      convert(row + column, width, dz);
      if (!transform.is_identity()) kernels_.finish(dz, width, transform);
      const bool here = target >= column && target < column + width;
      const S y = here && softcap_ != S(0) ? dz[target - column] * transform.temperature / softcap_ : S(0);
      kernels_.gradient(dz, width, transform, gradient);
      if (here) dz[target - column] += gradient.logprob / transform.temperature * (S(1) - y * y);
      convert(dz, width, out + column);
    }
  }

  int64_t num_rows, vocab;

 private:
  LogitTransform<S> transform_of(int64_t t) const {
    return {nullptr, softcap_, temperatures_ ? temperatures_[t] : temperature_};
  }

  // The finished logits: in `buffer`, or where they are if there is nothing to do.
  const S* finished(const In* z, int64_t width, const LogitTransform<S>& transform, S* buffer) const {
    if constexpr (std::is_same_v<In, S>) {
      if (transform.is_identity()) return z;
    }
    convert(z, width, buffer);
    if (!transform.is_identity()) kernels_.finish(buffer, width, transform);
    return buffer;
  }

  const In* logits_;
  int64_t stride_;
  const int64_t* targets_;
  const S* temperatures_;
  S temperature_, softcap_;
  int64_t ignore_index_;
  const HeadKernels<S>& kernels_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_logprobs(const Tensor& logits, const Tensor& targets,
                                                           double temperature,
                                                           const std::optional<Tensor>& temperatures,
                                                           std::optional<double> softcap, int64_t ignore_index) {
  const HeadOptions options{std::nullopt, temperature, temperatures, softcap, ignore_index};
  Tensor outputs[4];
  for (Tensor& x : outputs) {
    x = torch::stable::new_empty(logits, {logits.size(0)}, acc_dtype(logits.scalar_type()));
  }
  dispatch_floating(logits.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using S = acc_t<In>;
    const LogitRows<In> rows(logits, targets, options);
    S* out[4];
    for (int i = 0; i < 4; ++i) out[i] = mutable_data<S>(outputs[i]);
    parallel(rows.num_rows, [&](int64_t t) {
      if (rows.ignored(t)) {
        for (S* x : out) x[t] = 0;
        return;
      }
      const RowResult<S> result = rows.forward(t);
      out[0][t] = result.logprob;
      out[1][t] = result.entropy;
      out[2][t] = result.lse;
      out[3][t] = result.lse_residual;
    });
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

Tensor gather_logprobs_backward(const Tensor& grad_logprobs, const Tensor& grad_entropy, const Tensor& logits,
                                const Tensor& targets, double temperature, const std::optional<Tensor>& temperatures,
                                std::optional<double> softcap, int64_t ignore_index, const Tensor& entropy,
                                const Tensor& lse, const Tensor& lse_residual) {
  const HeadOptions options{std::nullopt, temperature, temperatures, softcap, ignore_index};
  Tensor grad = in_huge_pages(torch::stable::new_empty(logits, logits.sizes()));
  dispatch_floating(logits.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using S = acc_t<In>;
    const LogitRows<In> rows(logits, targets, options);
    const S *g = data<S>(grad_logprobs), *e = data<S>(grad_entropy);
    const S *h = data<S>(entropy), *l = data<S>(lse), *r = data<S>(lse_residual);
    In* out = mutable_data<In>(grad);
    parallel(rows.num_rows, [&](int64_t t) {
      In* row = out + t * rows.vocab;
      if (rows.ignored(t) || (g[t] == S(0) && e[t] == S(0))) {
        std::fill_n(row, rows.vocab, static_cast<In>(S(0)));
      } else {
        rows.backward(t, {g[t], e[t], l[t], r[t], h[t]}, row);
      }
    });
  });
  return grad;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("gather_logprobs", TORCH_BOX(&qrm_fast::gather_logprobs));
  m.impl("gather_logprobs_backward", TORCH_BOX(&qrm_fast::gather_logprobs_backward));
}
