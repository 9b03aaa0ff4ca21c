// What becomes of a chunk of logits while it is in cache: softmax statistics and the target's logit, or dZ in place.
//
// The statistics are folded online, per split of V. Splits are cut from V alone and joined in a tree, so a row's bits
// depend on its row, the weight and the bias.
#pragma once
#include <limits>
#include <vector>

#include "../memory.h"
#include "inputs.h"
#include "products.h"
#include "tiles.h"

namespace qrm_fast {

inline constexpr int64_t kScoredRows = 128;  // rows scored together by one thread: more of X^T leaves L2
inline constexpr int64_t kSplit = 480;       // columns whose statistics one unit of work folds; a multiple of kChunk
inline constexpr int64_t kSweep = 4;  // splits of weight that all blocks of rows pass before the next: they stay in L3

// What the fold of one row comes to, each rounded once. lse + lse_residual is the log-partition to twice the precision.
template <typename S>
struct RowResult {
  S logprob, entropy, lse, lse_residual;

  RowResult(const SoftmaxStats<S>& stats, S target_logit) {
    const double max = stats.max, sum = stats.sum, log_sum = std::log(sum);
    logprob = static_cast<S>((target_logit - max) - log_sum);
    if (logprob > 0) logprob = 0;
    entropy = static_cast<S>(log_sum - stats.weighted / sum);
    if (entropy < 0) entropy = 0;
    lse = static_cast<S>(max + log_sum);
    lse_residual = static_cast<S>((max - lse) + log_sum);
  }
};

// Statistics of rows, [split][panel][3][lanes], and their targets' logits, NaN where the target is not a column.
// `chunks` is the number of chunks whose running statistics are kept, or 0.
template <typename S>
class FoldedRows {
 public:
  FoldedRows(const PanelKernels<S>& kernels, int64_t panels, int64_t splits, int64_t chunks = 0)
      : target_logits(panels * kernels.gemm.nr, std::numeric_limits<S>::quiet_NaN()),
        kernels_(kernels),
        panels_(panels),
        splits_(splits),
        chunks_(chunks),
        stats_(splits * panels * size()),
        running_(chunks * panels * size()) {}

  S* of(int64_t split, int64_t panel) const { return stats_.get() + (split * panels_ + panel) * size(); }
  // Those of a split once this chunk of it had been folded.
  S* after(int64_t chunk, int64_t panel) const { return running_.get() + (chunk * panels_ + panel) * size(); }
  void keep(int64_t chunk, int64_t split, int64_t panel) const {
    if (chunk < chunks_) std::copy_n(of(split, panel), size(), after(chunk, panel));
  }

  // Joins the splits in a tree: one after the other, each would round all that came before it.
  void merge() const {
    parallel(panels_, [&](int64_t panel) {
      for (int64_t step = 1; step < splits_; step *= 2) {
        for (int64_t split = 0; split + step < splits_; split += 2 * step) {
          kernels_.merge(of(split, panel), of(split + step, panel));
        }
      }
    });
  }
  SoftmaxStats<S> total(int64_t row) const {
    const int64_t nr = kernels_.gemm.nr;
    const S* at = of(0, row / nr) + row % nr;
    return {at[0], at[nr], at[2 * nr]};
  }

  std::vector<S> target_logits;

 private:
  int64_t size() const { return 3 * kernels_.gemm.nr; }

  const PanelKernels<S>& kernels_;
  int64_t panels_, splits_, chunks_;
  Scratch<S> stats_, running_;
};

// Folds one split of `panels` panels, which are those from `panel` on of `folded`. The logits are kept in panels
// [V][lanes] of z, or go from chunk to chunk over the same panels [kChunk][lanes].
template <typename In, typename S>
void fold_split(const Head<In, S>& head, int64_t row, int64_t panels, int64_t split, const S* x, S* z, int64_t z_panel,
                bool keep, FoldedRows<S>& folded, int64_t panel) {
  const int64_t nr = head.lanes(), end = std::min(head.vocab, (split + 1) * kSplit);
  for (int64_t p = 0; p < panels; ++p) {
    S* stats = folded.of(split, panel + p);
    std::fill_n(stats, nr, -std::numeric_limits<S>::infinity());
    std::fill_n(stats + nr, 2 * nr, S(0));
  }
  for (int64_t column = split * kSplit; column < end; column += kChunk) {
    const int64_t width = std::min(kChunk, end - column);
    S* chunk = keep ? z + column * nr : z;
    form_logits(head, row, panels, column, width, x, chunk, z_panel);
    for (int64_t p = 0; p < panels; ++p) {
      const S* logits = chunk + p * z_panel;
      S* target_logits = folded.target_logits.data() + (panel + p) * nr;
      head.kernels.fold(logits, width, folded.of(split, panel + p));
      folded.keep(column / kChunk, split, panel + p);
      head.for_targets(row + p * nr, column, width,
                       [&](int64_t j, int64_t v) { target_logits[j] = logits[v * nr + j]; });
    }
  }
}

// Folds every split of the selected rows, packed in `x`.
template <typename In, typename S>
void fold_splits(const Head<In, S>& head, const S* x, FoldedRows<S>& folded) {
  const int64_t count = head.rows.size(), nr = head.lanes();
  const int64_t panels = ceil_div(count, nr), most = kScoredRows / nr, blocks = ceil_div(panels, most);
  const int64_t splits = ceil_div(head.vocab, kSplit), sweeps = ceil_div(splits, kSweep);
  const Scratch<S> logits(max_workers(sweeps * blocks) * kScoredRows * kChunk);
  parallel_workers(sweeps * blocks, [&](int64_t thread, auto next) {
    S* z = logits.get() + thread * kScoredRows * kChunk;
    for (int64_t unit; (unit = next()) < sweeps * blocks;) {
      const int64_t sweep = unit / blocks, first = unit % blocks * most, here = std::min(most, panels - first);
      for (int64_t split = sweep * kSweep; split < std::min(splits, (sweep + 1) * kSweep); ++split) {
        fold_split(head, first * nr, here, split, x + first * head.x_panel(), z, kChunk * nr, false, folded, first);
      }
    }
  });
}

// A forward pass over the selected rows.
template <typename In, typename S>
FoldedRows<S> fold_rows(const Head<In, S>& head) {
  const int64_t count = head.rows.size(), panels = ceil_div(count, head.lanes());
  const Scratch<S> x(panels * head.x_panel());
  head.pack_hidden(0, count, x.get());
  FoldedRows<S> folded(head.kernels, panels, ceil_div(head.vocab, kSplit));
  fold_splits(head, x.get(), folded);
  folded.merge();
  return folded;
}

// The coefficients of a block of rows, per lane. A lane without a row has coefficients 0 and p = 0.
template <typename In, typename S>
class BlockGradient {
 public:
  BlockGradient(const Head<In, S>& head, int64_t panels)
      : head_(head), lanes_(head.lanes()), values_(kFields * panels * lanes_) {}

  void set(int64_t row, int64_t height, const RowGradient<S>* rows) {
    for (int64_t p = 0; p * lanes_ < height; ++p) {
      S* at = values_.data() + p * kFields * lanes_;
      S* temperature = at + 5 * lanes_;
      head_.temperatures_of(row + p * lanes_, temperature);
      for (int64_t j = 0; j < lanes_; ++j) {
        const int64_t i = p * lanes_ + j;
        const RowGradient<S> g = i < height ? rows[i] : RowGradient<S>{0, 0, std::numeric_limits<S>::infinity(), 0, 0};
        const S fields[] = {g.logprob / temperature[j], g.entropy / temperature[j], g.lse, g.lse_residual, g.h};
        for (int f = 0; f < 5; ++f) at[f * lanes_ + j] = fields[f];
      }
    }
  }

  // Finished logits of panel p of the block, whose first row is `row` -> dZ in place.
  void apply(int64_t p, int64_t row, int64_t column, int64_t width, S* z) const {
    const S *at = values_.data() + p * kFields * lanes_, softcap = head_.softcap;
    const PanelGradient<S> g{at,     at + lanes_, at + 2 * lanes_, at + 3 * lanes_, at + 4 * lanes_, at + 5 * lanes_,
                             softcap};
    S own[kLargestTile];
    head_.for_targets(row, column, width, [&](int64_t j, int64_t v) {
      const S y = softcap == S(0) ? S(0) : z[v * lanes_ + j] * g.temperature[j] / softcap;
      own[j] = g.logprob[j] * (S(1) - y * y);
    });
    head_.kernels.gradient(z, width, g);
    head_.for_targets(row, column, width, [&](int64_t j, int64_t v) { z[v * lanes_ + j] += own[j]; });
  }

 private:
  static constexpr int64_t kFields = 6;
  const Head<In, S>& head_;
  int64_t lanes_;
  std::vector<S> values_;
};

}  // namespace qrm_fast
