// The inputs of a head kernel, and their packing.
//
// Hidden rows are packed into panels of `lanes()` rows, once per block of rows, and logits are stored transposed, as
// panels [V][lanes]: a row is a SIMD lane. All three products (products.h) then broadcast elements of one operand where
// it lies, and stream the other from a panel in L2; the weight is packed for dX only, a chunk at a time.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "../../check.h"
#include "../../dtypes.h"
#include "../../indices.h"
#include "../parallel.h"
#include "panels.h"

namespace qrm_fast {

struct [[gnu::visibility("hidden")]] HeadOptions {
  std::optional<Tensor> bias;
  double temperature;
  std::optional<Tensor> temperatures;
  std::optional<double> softcap;
  int64_t ignore_index;
};

// In: the dtype of hidden, weight and bias; S: what is accumulated. `rows` are the packed rows that take part: a row
// left out is never read.
template <typename In, typename S>
class Head {
 public:
  // Gradients need the widest panels, which are those without `most_rows`, the most that will take part.
  Head(const Tensor& hidden, const Tensor& weight, const Tensor& target_ids, const HeadOptions& options,
       int64_t most_rows = std::numeric_limits<int64_t>::max())
      : dim(hidden.size(1)),
        vocab(weight.size(0)),
        kernels(panel_kernels<S>(most_rows)),
        paired(std::is_same_v<In, torch::headeronly::BFloat16> && kernels.pair_tile != nullptr),
        steps(paired ? ceil_div(dim, 2) : dim),
        weight(data<In>(weight)),
        weight_stride(weight.stride(0)),
        softcap(S(options.softcap.value_or(0))),
        bias(options.bias ? vocab : 0),
        x_(data<In>(hidden)),
        targets_(data<int64_t>(target_ids)),
        num_tokens_(hidden.size(0)),
        x_stride_(hidden.stride(0)),
        temperatures_(data_or_null<S>(options.temperatures)),
        temperature_(S(options.temperature)),
        ignore_index_(options.ignore_index) {
    if (options.bias) {
      const In* b = data<In>(*options.bias);
      std::copy(b, b + vocab, bias.begin());
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

  int64_t lanes() const { return kernels.gemm.nr; }
  int64_t padded_dim() const { return round_up(dim, kernels.gemm.mr); }
  int64_t x_panel() const { return steps * lanes(); }  // elements of a panel of hidden rows
  bool logits_are_products() const {
    return bias.empty() && softcap == S(0) && temperatures_ == nullptr && temperature_ == S(1);
  }

  void temperatures_of(int64_t row, S* out) const {
    const int64_t filled = std::min<int64_t>(lanes(), rows.size() - row);
    std::fill(out, out + lanes(), temperatures_ ? S(1) : temperature_);
    for (int64_t j = 0; temperatures_ && j < filled; ++j) out[j] = temperatures_[rows[row + j]];
  }

  // f(lane, column within the chunk) for the rows of a panel whose target lies in it.
  template <typename F>
  void for_targets(int64_t row, int64_t column, int64_t width, F f) const {
    const int64_t filled = std::min<int64_t>(lanes(), rows.size() - row);
    for (int64_t j = 0; j < filled; ++j) {
      const int64_t v = targets_[rows[row + j]] - column;
      if (v >= 0 && v < width) f(j, v);
    }
  }

  // Panels [steps][lanes] of the rows [begin, begin + count): right operand of the logits. Lanes without a row are 0.
  void pack_hidden(int64_t begin, int64_t count, S* dst) const {
    const int64_t nr = lanes();
    parallel(ceil_div(count, nr), [&](int64_t panel) {
      S* out = dst + panel * x_panel();
      const int64_t filled = std::min(nr, count - panel * nr);
      if (filled < nr) std::fill(out, out + x_panel(), S(0));
      for (int64_t k0 = 0; k0 < steps; k0 += kLine) {
        const int64_t k1 = std::min(steps, k0 + kLine);
        for (int64_t j = 0; j < filled; ++j) {
          const In* in = x_ + rows[begin + panel * nr + j] * x_stride_;
          if (paired) {
            for (int64_t k = k0; k < k1; ++k) out[k * nr + j] = pair(in, k);
          } else {
            for (int64_t k = k0; k < k1; ++k) out[k * nr + j] = static_cast<S>(in[k]);
          }
        }
      }
    });
  }

  // The same rows as right operand of dW: [ceil(D / lanes)][count][lanes].
  void pack_hidden_by_dim(int64_t begin, int64_t count, S* dst) const {
    const int64_t nr = lanes();
    parallel(ceil_div(dim, nr), [&](int64_t panel) {
      S* out = dst + panel * count * nr;
      const int64_t filled = std::min(nr, dim - panel * nr);
      for (int64_t k = 0; k < count; ++k) {
        const In* in = x_ + rows[begin + k] * x_stride_ + panel * nr;
        for (int64_t j = 0; j < nr; ++j) out[k * nr + j] = j < filled ? static_cast<S>(in[j]) : S(0);
      }
    });
  }

  // dX^T of a block of rows, panels [padded_dim()][lanes] -> rows of the gradient, rounded once.
  template <typename Out>
  void unpack_hidden_gradient(int64_t row, int64_t height, const S* dx, Out* out) const {
    const int64_t nr = lanes();
    parallel(ceil_div(height, kLine), [&](int64_t unit) {
      for (int64_t d0 = 0; d0 < dim; d0 += kLine) {
        for (int64_t i = unit * kLine; i < std::min(height, (unit + 1) * kLine); ++i) {
          const S* from = dx + i / nr * padded_dim() * nr + i % nr;
          Out* to = out + rows[row + i] * dim;
          for (int64_t d = d0; d < std::min(dim, d0 + kLine); ++d) to[d] = static_cast<Out>(from[d * nr]);
        }
      }
    });
  }

  // Elements 2k and 2k + 1 of a row of D in the place of an S, 0 beyond the row.
  S pair(const In* row, int64_t k) const {
    S word = 0;
    if constexpr (2 * sizeof(In) == sizeof(S)) {
      const In two[] = {row[2 * k], 2 * k + 1 < dim ? row[2 * k + 1] : In(0)};
      std::memcpy(&word, two, sizeof word);
    }
    return word;
  }

  static constexpr int64_t kLine = 16;  // elements of a cache line of float

  int64_t dim, vocab;
  const PanelKernels<S>& kernels;
  bool paired;    // whether the logits are products of pairs of bfloat16
  int64_t steps;  // of the logits' sum: D, or half of it for pairs
  const In* weight;
  int64_t weight_stride;
  S softcap;
  std::vector<S> bias;
  std::vector<int64_t> rows;

 private:
  const In* x_;
  const int64_t* targets_;
  int64_t num_tokens_, x_stride_;
  const S* temperatures_;
  S temperature_;
  int64_t ignore_index_;
};

}  // namespace qrm_fast
