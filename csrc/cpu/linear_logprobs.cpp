// linear_logprobs: log_softmax(hidden @ weight.T) at the targets, and its entropy, without [T, V] logits.
//
// Forward: a block of weight rows is packed once and multiplied with every block of hidden rows; the product stays in
// L2, where it is folded into (max, sum, weighted sum) per row before the next block overwrites it. 2 T D V FLOP.
// V is cut into splits of kSplit columns, from V only, and their statistics are merged in order; a row's bits therefore
// depend on that row, weight and bias alone.
//
// Backward: per slab of kSlab weight rows and block of kRows hidden rows, the logits are computed again, turned into
// dZ in place, and multiplied twice: dX += dZ W, dW += dZ^T X. 6 T D V FLOP; dZ is the only buffer that is not packed
// input or result. Ignored rows, and rows without upstream gradient, are never read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "dtypes.h"
#include "head_tiles.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

constexpr int64_t kSplit = 2048;  // columns per unit of forward work
constexpr int64_t kChunk = 256;   // columns per packed block of weight; a multiple of every tile's width
constexpr int64_t kSlab = 1024;   // weight rows per step of the backward pass
constexpr int64_t kBlock = 96;    // hidden rows per product block; a multiple of every tile's height
constexpr int64_t kRows = 960;    // hidden rows per unit of work; a multiple of kBlock

struct Options {
  std::optional<Tensor> bias;
  double temperature;
  std::optional<Tensor> temperatures;
  std::optional<double> softcap;
  int64_t ignore_index;
};

// The head's inputs as plain pointers. In: their dtype, S: what is accumulated.
template <typename In, typename S>
struct Head {
  Head(const Tensor& hidden, const Tensor& weight, const Tensor& target_ids, const Options& options)
      : x(static_cast<const In*>(hidden.const_data_ptr())),
        w(static_cast<const In*>(weight.const_data_ptr())),
        targets(static_cast<const int64_t*>(target_ids.const_data_ptr())),
        num_tokens(hidden.size(0)),
        dim(hidden.size(1)),
        vocab(weight.size(0)),
        x_stride(hidden.stride(0)),
        w_stride(weight.stride(0)),
        temperatures(data_or_null<S>(options.temperatures)),
        temperature(S(options.temperature)),
        softcap(S(options.softcap.value_or(0))),
        bias(options.bias ? vocab : 0),
        kernels(head_kernels<S>()) {
    if (options.bias) {
      const In* b = static_cast<const In*>(options.bias->const_data_ptr());
      std::copy(b, b + vocab, bias.begin());
    }
  }

  LogitTransform<S> transform(int64_t row, int64_t column) const {
    return {bias.empty() ? nullptr : bias.data() + column, softcap, temperatures ? temperatures[row] : temperature};
  }

  // The rows for which `wanted(row)` holds among those not ignored. Throws ValueError for an id outside [0, V).
  template <typename F>
  std::vector<int64_t> rows(int64_t ignore_index, F wanted) const {
    std::vector<int64_t> selected;
    selected.reserve(num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (targets[t] == ignore_index) continue;
      CHECK_VALUE(targets[t] >= 0 && targets[t] < vocab, "targets must be in [0, ", vocab, ") or ", ignore_index,
                  ", got ", targets[t], " at row ", t);
      if (wanted(t)) selected.push_back(t);
    }
    return selected;
  }

  const In* x;
  const In* w;
  const int64_t* targets;
  int64_t num_tokens, dim, vocab, x_stride, w_stride;
  const S* temperatures;
  S temperature, softcap;
  std::vector<S> bias;
  const HeadKernels<S>& kernels;
};

template <typename F>
void parallel(int64_t count, F f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Packs `count` vectors in parallel, kBlock at a time: [ceil(count / width)][depth][width].
template <typename In, typename S>
void pack_all(const In* src, int64_t stride, int64_t depth_stride, const int64_t* rows, int64_t count, int64_t depth,
              int64_t width, S* dst) {
  const int64_t block = ceil_div(kBlock, width) * width;
  parallel(ceil_div(count, block), [&](int64_t i) {
    pack_panels(src, stride, depth_stride, rows, i * block, std::min(block, count - i * block), depth, width,
                dst + i * block * depth);
  });
}

template <typename In>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                   const Options& options) {
  using S = acc_t<In>;
  const Head<In, S> head(hidden, weight, targets, options);
  const HeadKernels<S>& kernels = head.kernels;
  const std::vector<int64_t> rows = head.rows(options.ignore_index, [](int64_t) { return true; });
  const int64_t count = rows.size(), dim = head.dim;

  Scratch<S> a(ceil_div(count, kernels.mr) * kernels.mr * dim);
  pack_all(head.x, head.x_stride, 1, rows.data(), count, dim, kernels.mr, a.get());

  const int64_t splits = ceil_div(head.vocab, kSplit), blocks = ceil_div(count, kRows);
  std::vector<SoftmaxStats<S>> stats(splits * count, SoftmaxStats<S>::empty());
  std::vector<S> target_logits(count);
  torch::stable::parallel_for(0, splits * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<S> b(kChunk * dim), c(kBlock * kChunk);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t split = unit / blocks, first_row = unit % blocks * kRows;
      const int64_t last_row = std::min(count, first_row + kRows);
      const int64_t last_column = std::min(head.vocab, (split + 1) * kSplit);
      for (int64_t column = split * kSplit; column < last_column; column += kChunk) {
        const int64_t width = std::min(kChunk, last_column - column);
        pack_panels(head.w, head.w_stride, 1, nullptr, column, width, dim, kernels.nr, b.get());
        for (int64_t row = first_row; row < last_row; row += kBlock) {
          const int64_t height = std::min(kBlock, last_row - row);
          multiply_panels(kernels.tile, kernels.mr, kernels.nr, height, width, dim, a.get() + row * dim, b.get(),
                          c.get(), kChunk, false);
          for (int64_t i = 0; i < height; ++i) {
            S* z = c.get() + i * kChunk;
            const LogitTransform<S> transform = head.transform(rows[row + i], column);
            if (!transform.is_identity()) kernels.finish(z, width, transform);
            const int64_t target = head.targets[rows[row + i]] - column;
            if (target >= 0 && target < width) target_logits[row + i] = z[target];
            stats[split * count + row + i].merge(kernels.fold(z, width));
          }
        }
      }
    }
  });

  const auto dtype = acc_dtype(hidden.scalar_type());
  Tensor outputs[4];
  S* out[4];
  for (int i = 0; i < 4; ++i) {
    outputs[i] = torch::stable::new_zeros(hidden, {head.num_tokens}, dtype);
    out[i] = static_cast<S*>(outputs[i].mutable_data_ptr());
  }
  for (int64_t i = 0; i < count; ++i) {
    SoftmaxStats<S> total = stats[i];
    for (int64_t split = 1; split < splits; ++split) total.merge(stats[split * count + i]);
    const S log_sum = std::log(total.sum);
    const S logprob = (target_logits[i] - total.max) - log_sum;
    const S entropy = log_sum - total.weighted / total.sum;
    out[0][rows[i]] = logprob > 0 ? S(0) : logprob;
    out[1][rows[i]] = entropy < 0 ? S(0) : entropy;
    const S lse = total.max + log_sum;
    out[2][rows[i]] = lse;
    out[3][rows[i]] = (total.max - lse) + log_sum;
  }
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

// dst[rows[i]] = src[i], rounded once; the rows left out become 0.
template <typename In, typename S>
Tensor scatter_rows(const Tensor& like, const S* src, const std::vector<int64_t>& rows, int64_t dim, int64_t stride) {
  Tensor result = torch::stable::new_zeros(like, like.sizes());
  In* dst = static_cast<In*>(result.mutable_data_ptr());
  parallel(rows.size(), [&](int64_t i) {
    for (int64_t d = 0; d < dim; ++d) dst[rows[i] * dim + d] = static_cast<In>(src[i * stride + d]);
  });
  return result;
}

template <typename In>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                            const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                            const Options& options, const Tensor& entropy, const Tensor& lse,
                                            const Tensor& lse_residual, bool need_hidden, bool need_weight,
                                            bool need_bias) {
  using S = acc_t<In>;
  const Head<In, S> head(hidden, weight, targets, options);
  const HeadKernels<S>& kernels = head.kernels;
  const int64_t mr = kernels.mr, nr = kernels.nr, dim = head.dim, vocab = head.vocab;
  const S* g = static_cast<const S*>(grad_logprobs.const_data_ptr());
  const S* e = static_cast<const S*>(grad_entropy.const_data_ptr());
  const S* h = static_cast<const S*>(entropy.const_data_ptr());
  const S* l = static_cast<const S*>(lse.const_data_ptr());
  const S* l_residual = static_cast<const S*>(lse_residual.const_data_ptr());
  const std::vector<int64_t> rows =
      head.rows(options.ignore_index, [&](int64_t t) { return !(g[t] == S(0) && e[t] == S(0)); });
  const int64_t count = rows.size();

  const int64_t slab = std::min(kSlab, ceil_div(vocab, kChunk) * kChunk);
  const int64_t wide = ceil_div(dim, nr) * nr;  // row stride of dX and dW, so that whole tiles fit
  const int64_t tall = ceil_div(count, kBlock) * kBlock;
  Scratch<S> x_by_row(tall * dim), x_by_dim(need_weight ? count * wide : 0);
  pack_all(head.x, head.x_stride, 1, rows.data(), count, dim, mr, x_by_row.get());
  if (need_weight) {
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t depth = std::min(kRows, count - row);
      parallel(wide / nr, [&](int64_t panel) {
        S* dst = x_by_dim.get() + row * wide + panel * depth * nr;
        const int64_t filled = std::min(nr, dim - panel * nr);
        for (int64_t k = 0; k < depth; ++k) {
          const In* src = head.x + rows[row + k] * head.x_stride + panel * nr;
          for (int64_t j = 0; j < nr; ++j) dst[k * nr + j] = j < filled ? static_cast<S>(src[j]) : S(0);
        }
      });
    }
  }
  Scratch<S> w_by_row(slab * dim), w_by_dim(need_hidden ? slab * wide : 0), dz(kRows * slab);
  Scratch<S> dx(need_hidden ? tall * wide : 0), dw(need_weight ? ceil_div(slab, mr) * mr * wide : 0);
  std::vector<double> db(need_bias ? vocab : 0, 0.0);
  Tensor none = torch::stable::new_empty(hidden, {0});
  Tensor weight_grad = need_weight ? torch::stable::new_empty(weight, weight.sizes()) : torch::stable::clone(none);
  In* weight_out = static_cast<In*>(weight_grad.mutable_data_ptr());

  for (int64_t column = 0; column < vocab; column += slab) {
    const int64_t columns = std::min(slab, vocab - column);
    pack_all(head.w + column * head.w_stride, head.w_stride, 1, static_cast<const int64_t*>(nullptr), columns, dim, nr,
             w_by_row.get());
    if (need_hidden) {
      pack_all(head.w + column * head.w_stride, 1, head.w_stride, static_cast<const int64_t*>(nullptr), dim, columns,
               nr, w_by_dim.get());
    }
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t height = std::min(kRows, count - row);
      const int64_t row_blocks = ceil_div(height, kBlock), column_chunks = ceil_div(columns, kChunk);

      parallel(row_blocks * column_chunks, [&](int64_t unit) {
        const int64_t i0 = unit % row_blocks * kBlock, j0 = unit / row_blocks * kChunk;
        const int64_t block = std::min(kBlock, height - i0), width = std::min(kChunk, columns - j0);
        S* tile = dz.get() + i0 * slab + j0;
        multiply_panels(kernels.tile, mr, nr, block, width, dim, x_by_row.get() + (row + i0) * dim,
                        w_by_row.get() + j0 * dim, tile, slab, false);
        for (int64_t i = 0; i < block; ++i) {
          const int64_t t = rows[row + i0 + i], target = head.targets[t] - column - j0;
          S* z = tile + i * slab;
          const LogitTransform<S> transform = head.transform(t, column + j0);
          if (!transform.is_identity()) kernels.finish(z, width, transform);
          S own = 0;
          if (target >= 0 && target < width) {
            const S y = transform.softcap == S(0) ? S(0) : z[target] * transform.temperature / transform.softcap;
            own = g[t] / transform.temperature * (S(1) - y * y);
          }
          kernels.gradient(z, width, transform, {g[t], e[t], l[t], l_residual[t], h[t]});
          if (target >= 0 && target < width) z[target] += own;
        }
      });

      if (need_hidden) {
        parallel(row_blocks, [&](int64_t unit) {
          const int64_t i0 = unit * kBlock, block = std::min(kBlock, height - i0);
          Scratch<S> a(kBlock * columns);
          pack_panels(dz.get() + i0 * slab, slab, 1, nullptr, 0, block, columns, mr, a.get());
          multiply_panels(kernels.tile, mr, nr, block, dim, columns, a.get(), w_by_dim.get(),
                          dx.get() + (row + i0) * wide, wide, column > 0);
        });
      }
      if (need_weight) {
        parallel(ceil_div(columns, kBlock), [&](int64_t unit) {
          const int64_t i0 = unit * kBlock, block = std::min(kBlock, columns - i0);
          Scratch<S> a(kBlock * height);
          pack_panels(dz.get() + i0, 1, slab, nullptr, 0, block, height, mr, a.get());
          multiply_panels(kernels.tile, mr, nr, block, dim, height, a.get(), x_by_dim.get() + row * wide,
                          dw.get() + i0 * wide, wide, row > 0);
        });
      }
      if (need_bias) {
        parallel(column_chunks, [&](int64_t chunk) {
          for (int64_t i = 0; i < height; ++i) {
            for (int64_t j = chunk * kChunk; j < std::min(columns, (chunk + 1) * kChunk); ++j) {
              db[column + j] += dz.get()[i * slab + j];
            }
          }
        });
      }
    }
    if (need_weight) {
      parallel(columns, [&](int64_t j) {
        for (int64_t d = 0; d < dim; ++d) {
          weight_out[(column + j) * dim + d] = static_cast<In>(count > 0 ? dw.get()[j * wide + d] : S(0));
        }
      });
    }
  }

  Tensor hidden_grad = need_hidden ? scatter_rows<In>(hidden, dx.get(), rows, dim, wide) : torch::stable::clone(none);
  if (need_bias) {
    Tensor bias_grad = torch::stable::new_empty(hidden, {vocab});
    In* out = static_cast<In*>(bias_grad.mutable_data_ptr());
    for (int64_t v = 0; v < vocab; ++v) out[v] = static_cast<In>(static_cast<S>(db[v]));
    none = bias_grad;
  }
  return {hidden_grad, weight_grad, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprobs(const Tensor& hidden, const Tensor& weight,
                                                           const Tensor& targets, const std::optional<Tensor>& bias,
                                                           double temperature,
                                                           const std::optional<Tensor>& temperatures,
                                                           std::optional<double> softcap, int64_t ignore_index) {
  const Options options{bias, temperature, temperatures, softcap, ignore_index};
  return dispatch_floating(hidden.scalar_type(),
                           [&](auto zero) { return forward<decltype(zero)>(hidden, weight, targets, options); });
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(
    const Tensor& grad_logprobs, const Tensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const Tensor& targets, const std::optional<Tensor>& bias, double temperature,
    const std::optional<Tensor>& temperatures, std::optional<double> softcap, int64_t ignore_index,
    const Tensor& entropy, const Tensor& lse, const Tensor& lse_residual, bool need_hidden, bool need_weight,
    bool need_bias) {
  const Options options{bias, temperature, temperatures, softcap, ignore_index};
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
