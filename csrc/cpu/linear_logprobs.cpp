// linear_logprobs: log_softmax(hidden @ weight.T) at the targets, and its entropy, without [T, V] logits.
//
// Forward: a chunk of weight rows is packed once and multiplied with every block of hidden rows; the product stays in
// L2, where it is folded into (max, sum, weighted sum) per row before the next block overwrites it. 2 T D V FLOP.
// V is cut into splits of kSplit columns, from V only, and their statistics are merged in order; a row's bits therefore
// depend on that row, weight and bias alone.
//
// Backward: per slab of kSlab weight rows and block of kRows hidden rows, the logits are computed again, turned into
// dZ in place, and multiplied twice: dX += dZ W, dW += dZ^T X. 6 T D V FLOP; dZ is the only buffer that is not packed
// input or result. Ignored rows, and rows without upstream gradient, are never read.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "head.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

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
    out[i] = static_cast<S*>(outputs[i].mutable_data_ptr());
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
  const auto data = [](const Tensor& x) { return static_cast<const S*>(x.const_data_ptr()); };
  const S *g = data(grad_logprobs), *e = data(grad_entropy);
  head.select_rows([&](int64_t t) { return !(g[t] == S(0) && e[t] == S(0)); });
  std::vector<RowGradient<S>> gradients;
  gradients.reserve(head.rows.size());
  for (int64_t t : head.rows) gradients.push_back({g[t], e[t], data(lse)[t], data(lse_residual)[t], data(entropy)[t]});

  const GemmKernel<S>& gemm = head.kernels.gemm;
  const int64_t count = head.rows.size(), dim = head.dim, vocab = head.vocab;
  const int64_t slab = std::min(kSlab, ceil_div(vocab, kChunk) * kChunk);
  const int64_t wide = ceil_div(dim, gemm.nr) * gemm.nr;
  Scratch<S> x(ceil_div(count, kBlock) * kBlock * dim), x_by_dim(need_weight ? count * wide : 0);
  head.pack_hidden(0, count, x.get());
  if (need_weight) {
    for (int64_t row = 0; row < count; row += kRows) {
      head.pack_hidden_by_dim(row, std::min(kRows, count - row), x_by_dim.get() + row * wide);
    }
  }
  Scratch<S> w(slab * dim), w_by_dim(need_hidden ? slab * wide : 0), dz(kRows * slab);
  Scratch<S> dx(need_hidden ? count * dim : 0), dw(need_weight ? slab * dim : 0);
  std::vector<double> db(need_bias ? vocab : 0, 0.0);
  Tensor hidden_grad =
      need_hidden ? torch::stable::new_zeros(hidden, hidden.sizes()) : torch::stable::new_empty(hidden, {0});
  Tensor weight_grad =
      need_weight ? torch::stable::new_zeros(weight, weight.sizes()) : torch::stable::new_empty(hidden, {0});
  Tensor bias_grad = torch::stable::new_empty(hidden, {need_bias ? vocab : 0});
  In* hidden_out = static_cast<In*>(hidden_grad.mutable_data_ptr());
  In* weight_out = static_cast<In*>(weight_grad.mutable_data_ptr());

  for (int64_t column = 0; column < vocab && count > 0; column += slab) {
    const int64_t columns = std::min(slab, vocab - column), chunks = ceil_div(columns, kChunk);
    parallel(chunks, [&](int64_t chunk) {
      const int64_t j = chunk * kChunk;
      head.pack_weight(column + j, std::min(kChunk, columns - j), w.get() + j * dim);
    });
    if (need_hidden) head.pack_weight_by_dim(column, columns, w_by_dim.get());
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t height = std::min(kRows, count - row), blocks = ceil_div(height, kBlock);
      parallel(blocks * chunks, [&](int64_t unit) {
        const int64_t i = unit % blocks * kBlock, j = unit / blocks * kChunk;
        const int64_t block = std::min(kBlock, height - i), width = std::min(kChunk, columns - j);
        S* tile = dz.get() + i * slab + j;
        head.logits(row + i, block, column + j, width, x.get() + (row + i) * dim, w.get() + j * dim, tile, slab);
        head.to_gradient(row + i, block, column + j, width, tile, slab, gradients.data() + row + i);
      });
      if (need_hidden) {
        add_hidden_gradient(gemm, dz.get(), slab, height, columns, w_by_dim.get(), dim, dx.get() + row * dim,
                            column > 0);
      }
      if (need_weight) {
        add_weight_gradient(gemm, dz.get(), slab, height, columns, x_by_dim.get() + row * wide, dim, dw.get(), row > 0);
      }
      if (need_bias) add_bias_gradient(dz.get(), slab, height, columns, db.data() + column);
    }
    if (need_weight) {
      parallel(columns, [&](int64_t j) { round_into(weight_out + (column + j) * dim, dw.get() + j * dim, dim); });
    }
  }
  if (need_hidden) {
    parallel(count, [&](int64_t i) { round_into(hidden_out + head.rows[i] * dim, dx.get() + i * dim, dim); });
  }
  round_into(static_cast<In*>(bias_grad.mutable_data_ptr()), db.data(), db.size());
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
