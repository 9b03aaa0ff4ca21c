// linear_logprobs: log_softmax(hidden @ weight.T) at the targets, and its entropy, without [T, V] logits.
//
// Forward: a block of kScoredRows hidden rows stays in L2 while a thread sweeps the weight's rows past it; a chunk of
// kChunk columns is folded into (max, sum, weighted sum) per row before the next overwrites it. 2 T D V FLOP. V is cut
// into splits of kSplit columns, from V only, and their statistics are merged in a tree; a row's bits therefore depend
// on that row, weight and bias alone.
//
// Backward: per slab of kBackwardSlab weight rows and block of kRows hidden rows, the logits are computed again, turned
// into dZ in place, and multiplied twice: dX += dZ W, dW += dZ^T X. 6 T D V FLOP; dZ is the only buffer that is not
// packed input or result. Ignored rows, and rows without upstream gradient, are never read.

#include "head/fold.h"
#include "memory.h"

namespace qrm_fast {
namespace {

constexpr int64_t kRows = 256;           // hidden rows of a block of the backward pass
constexpr int64_t kBackwardSlab = 8064;  // weight rows per step of the backward pass; a multiple of kChunk

template <typename In>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                   const HeadOptions& options) {
  using S = acc_t<In>;
  Head<In, S> head(hidden, weight, targets, options);
  head.select_rows([](int64_t) { return true; });
  const FoldedRows<S> folded = fold_rows(head);
  const auto dtype = acc_dtype(hidden.scalar_type());
  Tensor outputs[4];
  S* out[4];
  for (int i = 0; i < 4; ++i) {
    outputs[i] = torch::stable::new_zeros(hidden, {hidden.size(0)}, dtype);
    out[i] = mutable_data<S>(outputs[i]);
  }
  for (size_t i = 0; i < head.rows.size(); ++i) {
    const RowResult<S> result(folded.total(i), folded.target_logits[i]);
    const int64_t t = head.rows[i];
    out[0][t] = result.logprob;
    out[1][t] = result.entropy;
    out[2][t] = result.lse;
    out[3][t] = result.lse_residual;
  }
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

template <typename In>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                            const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                            const HeadOptions& options, const Tensor& entropy, const Tensor& lse,
                                            const Tensor& lse_residual, bool need_hidden, bool need_weight,
                                            bool need_bias) {
  using S = acc_t<In>;
  Head<In, S> head(hidden, weight, targets, options);
  const S *g = data<S>(grad_logprobs), *e = data<S>(grad_entropy);
  const S *h = data<S>(entropy), *l = data<S>(lse), *r = data<S>(lse_residual);
  head.select_rows([&](int64_t t) { return !(g[t] == S(0) && e[t] == S(0)); });
  std::vector<RowGradient<S>> gradients;
  gradients.reserve(head.rows.size());
  for (int64_t t : head.rows) gradients.push_back({g[t], e[t], l[t], r[t], h[t]});

  const int64_t count = head.rows.size(), dim = head.dim, vocab = head.vocab, nr = head.lanes();
  const int64_t panels = ceil_div(count, nr), most = kRows / nr, wide = round_up(dim, nr);
  const int64_t slab = std::min(kBackwardSlab, round_up(vocab, kChunk));
  constexpr bool kRounded = !std::is_same_v<In, S>;
  const Scratch<S> memory(
      {panels * head.x_panel(), need_weight ? count * wide : 0, need_hidden ? panels * head.padded_dim() * nr : 0,
       need_hidden ? hidden_gradient_scratch(head) : 0, need_weight && kRounded ? slab * dim : 0, kRows * slab});
  S *x = memory[0], *x_by_dim = memory[1], *dx = memory[2], *packed = memory[3], *dw = memory[4], *z = memory[5];
  head.pack_hidden(0, count, x);
  for (int64_t row = 0; row < count && need_weight; row += kRows) {
    head.pack_hidden_by_dim(row, std::min(kRows, count - row), x_by_dim + row * wide);
  }
  std::vector<double> db(need_bias ? vocab : 0, 0.0);
  Tensor hidden_grad =
      need_hidden ? torch::stable::new_zeros(hidden, hidden.sizes()) : torch::stable::new_empty(hidden, {0});
  Tensor weight_grad = !need_weight ? torch::stable::new_empty(hidden, {0})
                       : count == 0 ? torch::stable::new_zeros(weight, weight.sizes())
                                    : in_huge_pages(torch::stable::new_empty(weight, weight.sizes()));
  Tensor bias_grad = torch::stable::new_empty(hidden, {need_bias ? vocab : 0});
  In* hidden_out = mutable_data<In>(hidden_grad);
  In* weight_out = mutable_data<In>(weight_grad);
  BlockGradient<In, S> coefficients(head, most);

  for (int64_t column = 0; column < vocab && count > 0; column += slab) {
    const int64_t columns = std::min(slab, vocab - column), z_panel = slab * nr;
    S* dw_slab = dw;
    if constexpr (!kRounded) dw_slab = weight_out + column * dim;
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t height = std::min(kRows, count - row), here = ceil_div(height, nr);
      coefficients.set(row, height, gradients.data() + row);
      parallel_workers(ceil_div(columns, kChunk), [&](int64_t, auto next) {
        for (int64_t unit; (unit = next()) * kChunk < columns;) {
          const int64_t j = unit * kChunk, width = std::min(kChunk, columns - j);
          S* chunk = z + j * nr;
          form_logits(head, row, here, column + j, width, x + row / nr * head.x_panel(), chunk, z_panel);
          for (int64_t p = 0; p < here; ++p) {
            coefficients.apply(p, row + p * nr, column + j, width, chunk + p * z_panel);
          }
          if (need_weight) {
            add_weight_gradient(head, width, chunk, z_panel, height, x_by_dim + row * wide, dw_slab + j * dim, row > 0);
          }
          if (need_bias) add_bias_gradient(width, chunk, z_panel, height, nr, db.data() + column + j);
        }
      });
      if (need_hidden) {
        add_hidden_gradient(head, column, columns, z, z_panel, here, packed, dx + row * head.padded_dim());
      }
    }
    if (need_weight && kRounded) {
      parallel(columns, [&](int64_t j) { convert(dw + j * dim, dim, weight_out + (column + j) * dim); });
    }
  }
  if (need_hidden) head.unpack_hidden_gradient(0, count, dx, hidden_out);
  convert(db.data(), db.size(), mutable_data<In>(bias_grad));
  return {hidden_grad, weight_grad, bias_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprobs(const Tensor& hidden, const Tensor& weight,
                                                           const Tensor& targets, const std::optional<Tensor>& bias,
                                                           double temperature,
                                                           const std::optional<Tensor>& temperatures,
                                                           std::optional<double> softcap, int64_t ignore_index) {
  const HeadOptions options{bias, temperature, temperatures, softcap, ignore_index};
  return dispatch_floating(hidden.scalar_type(),
                           [&](auto zero) { return forward<decltype(zero)>(hidden, weight, targets, options); });
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(
    const Tensor& grad_logprobs, const Tensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const Tensor& targets, const std::optional<Tensor>& bias, double temperature,
    const std::optional<Tensor>& temperatures, std::optional<double> softcap, int64_t ignore_index,
    const Tensor& entropy, const Tensor& lse, const Tensor& lse_residual, bool need_hidden, bool need_weight,
    bool need_bias) {
  const HeadOptions options{bias, temperature, temperatures, softcap, ignore_index};
  return dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(grad_logprobs, grad_entropy, hidden, weight, targets, options, entropy, lse,
                                    lse_residual, need_hidden, need_weight, need_bias);
  });
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("linear_logprobs", TORCH_BOX(&qrm_fast::linear_logprobs));
  m.impl("linear_logprobs_backward", TORCH_BOX(&qrm_fast::linear_logprobs_backward));
}
