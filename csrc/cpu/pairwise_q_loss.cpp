// Q-RM's preference loss over packed pairs, and its gradient.
// Forward reads q once and the mask once (5 bytes per token in fp32); the per-pair rest is [P]. Backward reads the mask
// and writes one gradient per token; it needs only the margins and counts of the forward pass, never q. Sequences run
// in parallel, each summed from its own start in double, so a margin's bits depend on its own pair only; pairs are
// summed in order.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../dtypes.h"
#include "packed/cu_seqlens.h"
#include "parallel.h"

namespace qrm_fast {
namespace {

struct Sum {
  double total = 0;
  int64_t count = 0;
};

template <typename T>
Sum masked_sum(const T* x, const bool* mask, int64_t bos, int64_t eos) {
  Sum sum;
  for (int64_t t = bos; t < eos; ++t) {
    if (mask == nullptr || mask[t]) {
      sum.total += static_cast<acc_t<T>>(x[t]);
      ++sum.count;
    }
  }
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_q_loss(const Tensor& q, const Tensor& cu_seqlens,
                                                           const std::optional<Tensor>& mask, double beta,
                                                           double gamma) {
  const CuSeqlens cu(cu_seqlens, q.size(0));
  const int64_t num_pairs = cu.num_sequences() / 2;
  const auto dtype = acc_dtype(q.scalar_type());
  Tensor loss = torch::stable::new_empty(q, {}, dtype);
  Tensor margin = torch::stable::new_empty(q, {num_pairs}, dtype);
  Tensor accuracy = torch::stable::new_empty(q, {}, dtype);
  Tensor counts = torch::stable::new_empty(q, {2 * num_pairs}, ScalarType::Long);
  dispatch_floating(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* x = data<T>(q);
    const bool* m = data_or_null<bool>(mask);
    acc_t<T>* margins = mutable_data<acc_t<T>>(margin);
    int64_t* n = mutable_data<int64_t>(counts);
    parallel(num_pairs, [&](int64_t i) {
      const Sum chosen = masked_sum(x, m, cu[2 * i], cu[2 * i + 1]);
      const Sum rejected = masked_sum(x, m, cu[2 * i + 1], cu[2 * i + 2]);
      n[2 * i] = chosen.count;
      n[2 * i + 1] = rejected.count;
      const bool counted = chosen.count > 0 && rejected.count > 0;
      margins[i] = counted ? chosen.total / chosen.count - rejected.total / rejected.count : 0;
    });
    double total = 0;
    int64_t num_counted = 0, num_right = 0;
    for (int64_t i = 0; i < num_pairs; ++i) {
      if (n[2 * i] > 0 && n[2 * i + 1] > 0) {
        // softplus(x) without overflow: max(x, 0) + log(1 + exp(-|x|)); NaN comes through log1p
        const double x = gamma - beta * margins[i];
        total += std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
        num_right += margins[i] > 0;
        ++num_counted;
      }
    }
    const double denominator = std::max<int64_t>(num_counted, 1);
    *mutable_data<acc_t<T>>(loss) = total / denominator;
    *mutable_data<acc_t<T>>(accuracy) = num_right / denominator;
  });
  return {loss, margin, accuracy, counts};
}

template <typename T>
void fill_masked(T* grad, T value, const bool* mask, int64_t bos, int64_t eos) {
  for (int64_t t = bos; t < eos; ++t) grad[t] = mask == nullptr || mask[t] ? value : T(0.0f);
}

Tensor pairwise_q_loss_backward(const Tensor& grad_loss, const Tensor& grad_margin, const Tensor& q,
                                const Tensor& cu_seqlens, const std::optional<Tensor>& mask, const Tensor& margin,
                                const Tensor& counts, double beta, double gamma) {
  const CuSeqlens cu(cu_seqlens, q.size(0));
  const int64_t num_pairs = cu.num_sequences() / 2;
  const int64_t* n = data<int64_t>(counts);
  int64_t num_counted = 0;
  for (int64_t i = 0; i < num_pairs; ++i) num_counted += n[2 * i] > 0 && n[2 * i + 1] > 0;
  Tensor grad = torch::stable::empty_like(q);
  dispatch_floating(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool* m = data_or_null<bool>(mask);
    const double upstream = *data<acc_t<T>>(grad_loss);
    const acc_t<T>* upstream_margin = data<acc_t<T>>(grad_margin);
    const acc_t<T>* margins = data<acc_t<T>>(margin);
    T* g = mutable_data<T>(grad);
    parallel(num_pairs, [&](int64_t i) {
      double grad_i = 0;
      if (n[2 * i] > 0 && n[2 * i + 1] > 0) {
        // d loss / d margin_i = -beta sigmoid(gamma - beta margin_i) / counted pairs
        const double slope = -beta / (1 + std::exp(beta * margins[i] - gamma)) / num_counted;
        grad_i = upstream * slope + upstream_margin[i];
      }
      for (int side = 0; side < 2; ++side) {
        const double row = (side == 0 ? grad_i : -grad_i) / std::max<int64_t>(n[2 * i + side], 1);
        fill_masked<T>(g, static_cast<acc_t<T>>(row), m, cu[2 * i + side], cu[2 * i + side + 1]);
      }
    });
  });
  return grad;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("pairwise_q_loss", TORCH_BOX(&qrm_fast::pairwise_q_loss));
  m.impl("pairwise_q_loss_backward", TORCH_BOX(&qrm_fast::pairwise_q_loss_backward));
}
