// Shared by the head kernels: the inputs as pointers, parallel packing, and the three things done with a block of
// logits while it is in cache: fold it into softmax statistics, turn it into dZ, multiply dZ into dX, dW and db.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../check.h"
#include "dtypes.h"
#include "head_tiles.h"

namespace qrm_fast {

inline constexpr int64_t kSplit = 2048;  // columns whose statistics one unit of work folds, cut from V only
inline constexpr int64_t kChunk = 256;   // columns per product block; a multiple of every tile's width
inline constexpr int64_t kSlab = 1024;   // weight rows per step of a backward pass; a multiple of kChunk
inline constexpr int64_t kBlock = 96;    // hidden rows per product block; a multiple of every tile's height
inline constexpr int64_t kRows = 960;    // hidden rows per unit of work; a multiple of kBlock

struct [[gnu::visibility("hidden")]] HeadOptions {
  std::optional<torch::stable::Tensor> bias;
  double temperature;
  std::optional<torch::stable::Tensor> temperatures;
  std::optional<double> softcap;
  int64_t ignore_index;
};

template <typename F>
void parallel(int64_t count, F f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// What the fold of one row comes to. lse + lse_residual is the log-partition to twice the precision.
template <typename S>
struct RowResult {
  S logprob, entropy, lse, lse_residual;

  RowResult(const SoftmaxStats<S>& stats, S target_logit) {
    const S log_sum = std::log(stats.sum);
    logprob = (target_logit - stats.max) - log_sum;
    if (logprob > 0) logprob = 0;
    entropy = log_sum - stats.weighted / stats.sum;
    if (entropy < 0) entropy = 0;
    lse = stats.max + log_sum;
    lse_residual = (stats.max - lse) + log_sum;
  }
};

// In: the dtype of hidden, weight and bias; S: what is accumulated. `rows` are the packed rows that take part: a row
// left out is never read.
template <typename In, typename S>
class Head {
 public:
  Head(const torch::stable::Tensor& hidden, const torch::stable::Tensor& weight,
       const torch::stable::Tensor& target_ids, const HeadOptions& options)
      : dim(hidden.size(1)),
        vocab(weight.size(0)),
        kernels(head_kernels<S>()),
        x_(static_cast<const In*>(hidden.const_data_ptr())),
        w_(static_cast<const In*>(weight.const_data_ptr())),
        targets_(static_cast<const int64_t*>(target_ids.const_data_ptr())),
        num_tokens_(hidden.size(0)),
        x_stride_(hidden.stride(0)),
        w_stride_(weight.stride(0)),
        temperatures_(data_or_null<S>(options.temperatures)),
        temperature_(S(options.temperature)),
        softcap_(S(options.softcap.value_or(0))),
        bias_(options.bias ? vocab : 0),
        ignore_index_(options.ignore_index) {
    if (options.bias) {
      const In* b = static_cast<const In*>(options.bias->const_data_ptr());
      std::copy(b, b + vocab, bias_.begin());
    }
  }

  // Selects the rows for which `wanted(row)` holds among those not ignored. Throws ValueError for an id outside [0, V).
  template <typename F>
  void select_rows(F wanted) {
    for (int64_t t = 0; t < num_tokens_; ++t) {
      const int64_t target = targets_[t];
      if (target == ignore_index_) continue;
      CHECK_VALUE(target >= 0 && target < vocab, "targets must be in [0, ", vocab, ") or ", ignore_index_, ", got ",
                  target, " at row ", t);
      if (wanted(t)) rows.push_back(t);
    }
  }

  // Rows [begin, begin + count) as left operand of a product over D.
  void pack_hidden(int64_t begin, int64_t count, S* dst) const {
    pack_all(x_, x_stride_, 1, rows.data() + begin, count, dim, kernels.gemm.mr, dst);
  }

  // The same rows as right operand of a product over the rows: [D / nr][count][nr].
  void pack_hidden_by_dim(int64_t begin, int64_t count, S* dst) const {
    const int64_t nr = kernels.gemm.nr;
    parallel(ceil_div(dim, nr), [&](int64_t panel) {
      S* out = dst + panel * count * nr;
      const int64_t filled = std::min(nr, dim - panel * nr);
      for (int64_t k = 0; k < count; ++k) {
        const In* in = x_ + rows[begin + k] * x_stride_ + panel * nr;
        for (int64_t j = 0; j < nr; ++j) out[k * nr + j] = j < filled ? static_cast<S>(in[j]) : S(0);
      }
    });
  }

  // Weight rows [begin, begin + count) as right operand of a product over D; in this thread.
  void pack_weight(int64_t begin, int64_t count, S* dst) const {
    pack_panels(w_, w_stride_, 1, nullptr, begin, count, dim, kernels.gemm.nr, dst);
  }

  // The same rows as right operand of a product over those rows: [D / nr][count][nr].
  void pack_weight_by_dim(int64_t begin, int64_t count, S* dst) const {
    pack_all(w_ + begin * w_stride_, 1, w_stride_, static_cast<const int64_t*>(nullptr), dim, count, kernels.gemm.nr,
             dst);
  }

  // Finished logits of `height` rows from `row` on and `width` columns from `column` on. `a`, `b`: packed operands.
  void logits(int64_t row, int64_t height, int64_t column, int64_t width, const S* a, const S* b, S* z,
              int64_t ldz) const {
    multiply_panels(kernels.gemm, height, width, dim, a, b, z, ldz, false);
    for (int64_t i = 0; i < height; ++i) {
      const LogitTransform<S> t = transform(rows[row + i], column);
      if (!t.is_identity()) kernels.finish(z + i * ldz, width, t);
    }
  }

  // Folds a block of finished logits into each row's statistics, and keeps the target's logit.
  void fold(int64_t row, int64_t height, int64_t column, int64_t width, const S* z, int64_t ldz, SoftmaxStats<S>* stats,
            S* target_logits) const {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t target = targets_[rows[row + i]] - column;
      if (target >= 0 && target < width) target_logits[i] = z[i * ldz + target];
      stats[i].merge(kernels.fold(z + i * ldz, width));
    }
  }

  // Block of finished logits -> dZ in place, with the coefficients of each of its rows.
  void to_gradient(int64_t row, int64_t height, int64_t column, int64_t width, S* z, int64_t ldz,
                   const RowGradient<S>* gradients) const {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t target = targets_[rows[row + i]] - column;
      const bool here = target >= 0 && target < width;
      const LogitTransform<S> t = transform(rows[row + i], column);
      S* dz = z + i * ldz;
      const S y = here && softcap_ != S(0) ? dz[target] * t.temperature / softcap_ : S(0);
      kernels.gradient(dz, width, t, gradients[i]);
      if (here) dz[target] += gradients[i].logprob / t.temperature * (S(1) - y * y);
    }
  }

  int64_t dim, vocab;
  const HeadKernels<S>& kernels;
  std::vector<int64_t> rows;

 private:
  LogitTransform<S> transform(int64_t t, int64_t column) const {
    return {bias_.empty() ? nullptr : bias_.data() + column, softcap_, temperatures_ ? temperatures_[t] : temperature_};
  }

  template <typename Index>
  static void pack_all(const In* src, int64_t stride, int64_t depth_stride, const Index* index, int64_t count,
                       int64_t depth, int64_t width, S* dst) {
    const int64_t block = ceil_div(kBlock, width) * width;
    parallel(ceil_div(count, block), [&](int64_t i) {
      pack_panels(src, stride, depth_stride, index, i * block, std::min(block, count - i * block), depth, width,
                  dst + i * block * depth);
    });
  }

  const In* x_;
  const In* w_;
  const int64_t* targets_;
  int64_t num_tokens_, x_stride_, w_stride_;
  const S* temperatures_;
  S temperature_, softcap_;
  std::vector<S> bias_;
  int64_t ignore_index_;
};

// The selected rows' statistics, [splits][rows], and their targets' logits, NaN where the target is not a column.
template <typename S>
struct FoldedRows {
  FoldedRows(int64_t count, int64_t splits)
      : stats(splits * count, SoftmaxStats<S>::empty()), target_logits(count, std::numeric_limits<S>::quiet_NaN()) {}

  SoftmaxStats<S> total(int64_t row) const {
    SoftmaxStats<S> sum = stats[row];
    for (size_t i = row + target_logits.size(); i < stats.size(); i += target_logits.size()) sum.merge(stats[i]);
    return sum;
  }

  std::vector<SoftmaxStats<S>> stats;
  std::vector<S> target_logits;
};

// A forward pass over the selected rows.
template <typename In, typename S>
FoldedRows<S> fold_rows(const Head<In, S>& head) {
  const int64_t count = head.rows.size(), dim = head.dim;
  Scratch<S> a(ceil_div(count, kBlock) * kBlock * dim);
  head.pack_hidden(0, count, a.get());

  const int64_t splits = ceil_div(head.vocab, kSplit), blocks = ceil_div(count, kRows);
  FoldedRows<S> folded(count, splits);
  torch::stable::parallel_for(0, splits * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<S> b(kChunk * dim), z(kBlock * kChunk);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t split = unit / blocks, first_row = unit % blocks * kRows;
      const int64_t last_row = std::min(count, first_row + kRows);
      const int64_t last_column = std::min(head.vocab, (split + 1) * kSplit);
      for (int64_t column = split * kSplit; column < last_column; column += kChunk) {
        const int64_t width = std::min(kChunk, last_column - column);
        head.pack_weight(column, width, b.get());
        for (int64_t row = first_row; row < last_row; row += kBlock) {
          const int64_t height = std::min(kBlock, last_row - row);
          head.logits(row, height, column, width, a.get() + row * dim, b.get(), z.get(), kChunk);
          head.fold(row, height, column, width, z.get(), kChunk, folded.stats.data() + split * count + row,
                    folded.target_logits.data() + row);
        }
      }
    }
  });
  return folded;
}

// dX [height, D] (+)= dZ [height, columns] W. Sums over V run in the order of the slabs: a row's bits are its own.
template <typename S>
void add_hidden_gradient(const GemmKernel<S>& gemm, const S* dz, int64_t ldz, int64_t height, int64_t columns,
                         const S* w_by_dim, int64_t dim, S* dx, bool accumulate) {
  parallel(ceil_div(height, kBlock), [&](int64_t unit) {
    const int64_t i0 = unit * kBlock, block = std::min(kBlock, height - i0);
    Scratch<S> a(kBlock * columns);
    pack_panels(dz + i0 * ldz, ldz, 1, nullptr, 0, block, columns, gemm.mr, a.get());
    multiply_panels(gemm, block, dim, columns, a.get(), w_by_dim, dx + i0 * dim, dim, accumulate);
  });
}

// dW [columns, D] (+)= dZ^T X.
template <typename S>
void add_weight_gradient(const GemmKernel<S>& gemm, const S* dz, int64_t ldz, int64_t height, int64_t columns,
                         const S* x_by_dim, int64_t dim, S* dw, bool accumulate) {
  parallel(ceil_div(columns, kBlock), [&](int64_t unit) {
    const int64_t i0 = unit * kBlock, block = std::min(kBlock, columns - i0);
    Scratch<S> a(kBlock * height);
    pack_panels(dz + i0, 1, ldz, nullptr, 0, block, height, gemm.mr, a.get());
    multiply_panels(gemm, block, dim, height, a.get(), x_by_dim, dw + i0 * dim, dim, accumulate);
  });
}

// db [columns] += column sums of dZ.
template <typename S>
void add_bias_gradient(const S* dz, int64_t ldz, int64_t height, int64_t columns, double* db) {
  parallel(ceil_div(columns, kChunk), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(columns, begin + kChunk);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = begin; j < end; ++j) db[j] += dz[i * ldz + j];
    }
  });
}

// dst[i] = src[i] in the gradient's dtype, rounded once.
template <typename Out, typename S>
void round_into(Out* dst, const S* src, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<Out>(src[i]);
}

}  // namespace qrm_fast
