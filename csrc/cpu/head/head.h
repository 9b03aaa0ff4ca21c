// Shared by the head kernels: the inputs as pointers, their packing, and what is done with a block of logits while it
// is in cache: fold it into softmax statistics, turn it into dZ, multiply dZ into dX, dW and db.
//
// Logits are stored transposed, as panels [vocabulary][lanes] of `nr` batch rows. Then all three products broadcast
// elements of an operand that is read where it lies (the weight's rows, dZ), stream the other one from a panel in L2,
// and only hidden rows are packed, once per block of rows:
//   z  [v][row] = sum_k W[v, k] X^T[k][row]        dW [v][d] = sum_row dZ[v][row] X[row][d]
//   dX^T [d][row] = sum_v W^T[d, v] dZ[v][row], where a chunk of W is packed for all rows of the block.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <vector>

#include "../../check.h"
#include "../dtypes.h"
#include "../simd/target_clones.h"
#include "panels.h"
#include "tiles.h"

namespace qrm_fast {

inline constexpr int64_t kResident = 512;    // steps along D per pass: X^T of kRows rows and so many steps stays in L2
inline constexpr int64_t kScoredRows = 128;  // hidden rows scored together by one thread: more of X^T leaves L2
inline constexpr int64_t kRows = 256;        // hidden rows of a block whose gradients are computed together
inline constexpr int64_t kChunk = 96;  // columns folded or differentiated at a time; a multiple of every tile's rows
inline constexpr int64_t kSweep = 4;   // splits of weight that all blocks of rows pass before the next: they stay in L3
inline constexpr int64_t kSplit = 480;   // columns whose statistics one unit of work folds, cut from V; of kChunk
inline constexpr int64_t kSlab = 16896;  // columns between two barriers of a backward pass; a multiple of kChunk
inline constexpr int64_t kSteps = 256;   // columns per step of dX
inline constexpr int64_t kMostRows = 6;  // of a tile
inline constexpr int64_t kGroup = 128;   // columns of D per pass of dW, whose X is read again and again from L2

struct [[gnu::visibility("hidden")]] HeadOptions {
  std::optional<torch::stable::Tensor> bias;
  double temperature;
  std::optional<torch::stable::Tensor> temperatures;
  std::optional<double> softcap;
  int64_t ignore_index;
};

template <typename In, typename S>
QRM_FAST_TARGET_CLONES static void convert(const In* __restrict in, int64_t count, S* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<S>(in[i]);
}

template <typename F>
void parallel(int64_t count, F f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Runs `worker(thread, next)` on at most max_workers(count) threads, where next() is the next of `count` units or
// `count` when none is left. Which thread gets which must not matter to the results.
inline int64_t max_workers(int64_t count) { return std::min<int64_t>(count, torch::stable::get_num_threads()); }

template <typename F>
void parallel_workers(int64_t count, F worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return std::min(taken.fetch_add(1), count); };
  torch::stable::parallel_for(0, max_workers(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) worker(thread, next);
  });
}

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
template <typename S>
class FoldedRows {
 public:
  FoldedRows(const PanelKernels<S>& kernels, int64_t panels, int64_t splits)
      : target_logits(panels * kernels.gemm.nr, std::numeric_limits<S>::quiet_NaN()),
        kernels_(kernels),
        panels_(panels),
        splits_(splits),
        stats_(splits * panels * size()) {}

  S* of(int64_t split, int64_t panel) const { return stats_.get() + (split * panels_ + panel) * size(); }

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
  int64_t panels_, splits_;
  Scratch<S> stats_;
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
        kernels(panel_kernels<S>()),
        paired_(std::is_same_v<In, torch::headeronly::BFloat16> && kernels.pair_tile != nullptr),
        steps_(paired_ ? ceil_div(dim, 2) : dim),
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

  int64_t lanes() const { return kernels.gemm.nr; }

  // Elements of a panel of hidden rows: [D][lanes] or, of pairs, [ceil(D / 2)][lanes].
  int64_t x_panel() const { return steps_ * lanes(); }

  // Panels of the rows [begin, begin + count): right operand of the logits. Lanes without a row are 0.
  void pack_hidden(int64_t begin, int64_t count, S* dst) const {
    const int64_t nr = lanes();
    parallel(ceil_div(count, nr), [&](int64_t panel) {
      S* out = dst + panel * x_panel();
      const int64_t filled = std::min(nr, count - panel * nr);
      if (filled < nr) std::fill(out, out + x_panel(), S(0));
      for (int64_t k0 = 0; k0 < steps_; k0 += kLine) {
        const int64_t k1 = std::min(steps_, k0 + kLine);
        for (int64_t j = 0; j < filled; ++j) {
          const In* in = x_ + rows[begin + panel * nr + j] * x_stride_;
          if (paired_) {
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

  // Finished logits of `width` columns from `column` on and the rows of `panels` panels from `row` on, packed in `x`.
  // Panel p goes to z + p * z_panel; lines up to the next multiple of mr beyond `width` are overwritten.
  void logits(int64_t row, int64_t panels, int64_t column, int64_t width, const S* x, S* z, int64_t z_panel) const {
    const GemmKernel<S>& gemm = kernels.gemm;
    for (int64_t k = 0; k == 0 || k < steps_; k += kResident) {
      for (int64_t i = 0; i < width; i += gemm.mr) {
        logits_of_tile_row(column + i, std::min(gemm.mr, width - i), k, panels, x, z + i * gemm.nr, z_panel);
      }
    }
    if (bias_.empty() && softcap_ == S(0) && temperatures_ == nullptr && temperature_ == S(1)) return;
    for (int64_t p = 0; p < panels; ++p) {
      S temperature[kLargestTile];
      temperatures_of(row + p * gemm.nr, temperature);
      kernels.finish(z + p * z_panel, width, {bias_.empty() ? nullptr : bias_.data() + column, softcap_, temperature});
    }
  }

  // Joins the finished logits of one panel, whose first row is `row`, to `stats` [3][lanes]; keeps the targets' logits.
  void fold(int64_t row, int64_t column, int64_t width, const S* z, S* stats, S* target_logits) const {
    kernels.fold(z, width, stats);
    for_targets(row, column, width, [&](int64_t j, int64_t v) { target_logits[j] = z[v * lanes() + j]; });
  }

  // Folds one split of `panels` panels, which are those from `panel` on of `folded`. The logits are kept in panels
  // [V][lanes] of z, or go from chunk to chunk over the same panels [kChunk][lanes].
  void fold_split(int64_t row, int64_t panels, int64_t split, const S* x, S* z, int64_t z_panel, bool keep,
                  FoldedRows<S>& folded, int64_t panel) const {
    const int64_t nr = lanes(), end = std::min(vocab, (split + 1) * kSplit);
    for (int64_t p = 0; p < panels; ++p) {
      S* stats = folded.of(split, panel + p);
      std::fill_n(stats, nr, -std::numeric_limits<S>::infinity());
      std::fill_n(stats + nr, 2 * nr, S(0));
    }
    for (int64_t column = split * kSplit; column < end; column += kChunk) {
      const int64_t width = std::min(kChunk, end - column);
      S* chunk = keep ? z + column * nr : z;
      logits(row, panels, column, width, x, chunk, z_panel);
      for (int64_t p = 0; p < panels; ++p) {
        fold(row + p * nr, column, width, chunk + p * z_panel, folded.of(split, panel + p),
             folded.target_logits.data() + (panel + p) * nr);
      }
    }
  }

  // Finished logits of one panel -> dZ in place.
  void to_gradient(int64_t row, int64_t column, int64_t width, S* z, const PanelGradient<S>& g) const {
    const int64_t nr = lanes();
    S own[kLargestTile];
    for_targets(row, column, width, [&](int64_t j, int64_t v) {
      const S y = softcap_ == S(0) ? S(0) : z[v * nr + j] * g.temperature[j] / softcap_;
      own[j] = g.logprob[j] * (S(1) - y * y);
    });
    kernels.gradient(z, width, g);
    for_targets(row, column, width, [&](int64_t j, int64_t v) { z[v * nr + j] += own[j]; });
  }

  // dX^T [panels][padded_dim()][lanes] (+)= W^T dZ over `columns` columns from `column` on. A thread owns some of D;
  // sums run through V in fixed steps: a row's bits are its own. `w`: [hidden_gradient_scratch()].
  void add_hidden_gradient(int64_t column, int64_t columns, const S* dz, int64_t z_panel, int64_t panels, S* w,
                           S* dx) const {
    const int64_t mr = kernels.gemm.mr, tiles = ceil_div(dim, mr), threads = max_workers(tiles);
    parallel(threads, [&](int64_t thread) {
      const int64_t begin = tiles * thread / threads, end = tiles * (thread + 1) / threads;
      S* packed = w + thread * packed_step();
      for (int64_t first = begin; first < end; first += packed_tiles()) {
        const int64_t count = std::min(packed_tiles(), end - first);
        for (int64_t k = 0; k < columns; k += kSteps) {
          const int64_t steps = std::min(kSteps, columns - k);
          pack_weight_by_dim(column + k, steps, first * mr, count, packed);
          add_hidden_gradient_step(column + k, steps, first, count, packed, dz + k * lanes(), z_panel, panels, dx);
        }
      }
    });
  }
  int64_t hidden_gradient_scratch() const { return max_workers(ceil_div(dim, kernels.gemm.mr)) * packed_step(); }

  // dW [width, D] (+)= dZ X for one chunk.
  void add_weight_gradient(int64_t width, const S* dz, int64_t z_panel, int64_t height, const S* x_by_dim, S* dw,
                           bool accumulate) const {
    const GemmKernel<S>& gemm = kernels.gemm;
    const int64_t piece = ahead_piece<S>(gemm.nr), slots = std::max<int64_t>(1, height / gemm.nr);
    Tile<S> tile;
    tile.depth = height;
    tile.a_row = gemm.nr;
    tile.a_step = 1;
    tile.a_jump = z_panel - gemm.nr;
    tile.ldc = dim;
    tile.accumulate = accumulate;
    tile.ahead_jump = dim - piece;
    for (int64_t group = 0; group < dim; group += kGroup) {
      const int64_t group_end = std::min(dim, group + kGroup);
      for (int64_t i = 0; i < width; i += gemm.mr) {
        tile.a = dz + i * gemm.nr;
        for (int64_t d = group; d < group_end; d += gemm.nr) {
          const int64_t t = (d - group) / gemm.nr, pieces = ceil_div(kGroup, piece);
          tile.ahead = dw + (i + gemm.mr + t / pieces * slots) * dim + group + t % pieces * piece;
          tile.soon = tile.b = x_by_dim + d * height;
          tile.c = dw + i * dim + d;
          if (i + gemm.mr <= width && d + gemm.nr <= dim) {
            gemm.tile(tile);
          } else {
            partial_tile(gemm, tile, std::min(gemm.mr, width - i), std::min(gemm.nr, dim - d));
          }
        }
      }
    }
  }

  // db [width] += sums of dZ over the rows, for one chunk.
  void add_bias_gradient(int64_t width, const S* dz, int64_t z_panel, int64_t height, double* db) const {
    const int64_t nr = lanes();
    for (int64_t row = 0; row < height; row += nr, dz += z_panel) {
      const int64_t filled = std::min(nr, height - row);
      for (int64_t v = 0; v < width; ++v) {
        for (int64_t j = 0; j < filled; ++j) db[v] += dz[v * nr + j];
      }
    }
  }

  // dX^T of a block of rows -> rows of the gradient, rounded once.
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

  int64_t padded_dim() const { return round_up(dim, kernels.gemm.mr); }

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

  S softcap() const { return softcap_; }

  int64_t dim, vocab;
  const PanelKernels<S>& kernels;
  std::vector<int64_t> rows;

 private:
  static constexpr int64_t kLine = 16;

  // Elements 2k and 2k + 1 of a row of D in the place of an S, 0 beyond the row.
  S pair(const In* row, int64_t k) const {
    S word = 0;
    if constexpr (2 * sizeof(In) == sizeof(S)) {
      const In two[] = {row[2 * k], 2 * k + 1 < dim ? row[2 * k + 1] : In(0)};
      std::memcpy(&word, two, sizeof word);
    }
    return word;
  }

  // The steps [first, first + depth) of `count` rows of weight, [mr][kDepth], zeros beyond.
  void convert_rows(const In* w, int64_t count, int64_t first, int64_t depth, S* dst) const {
    for (int64_t r = 0; r < kernels.gemm.mr; ++r, dst += kDepth, w += w_stride_) {
      if (r < count && paired_) {
        for (int64_t k = 0; k < depth; ++k) dst[k] = pair(w, first + k);
      } else if (r < count) {
        convert(w + first, depth, dst);
      } else {
        std::fill_n(dst, depth, S(0));
      }
    }
  }

  // z (+)= `count` weight rows times the panels of x, over kResident steps from `first` on.
  void logits_of_tile_row(int64_t column, int64_t count, int64_t first, int64_t panels, const S* x, S* z,
                          int64_t z_panel) const {
    const GemmKernel<S>& gemm = kernels.gemm;
    const In* w = w_ + column * w_stride_;
    const bool whole = std::is_same_v<In, S> || (paired_ && dim % 2 == 0 && w_stride_ % 2 == 0);
    const bool direct = whole && count == gemm.mr;
    const int64_t piece = ahead_piece<S>(gemm.nr), stride = w_stride_ * sizeof(In) / sizeof(S);
    const int64_t step = paired_ ? 2 : 1;
    // Beyond the last row only a hint.
    const S* next = reinterpret_cast<const S*>(w + gemm.mr * w_stride_ + first * step);
    S converted[kMostRows * kDepth];
    Tile<S> tile;
    tile.a_row = direct ? stride : kDepth;
    tile.a_step = 1;
    tile.a_jump = 0;
    tile.ldc = gemm.nr;
    tile.ahead_jump = stride - piece;
    const int64_t end = std::max<int64_t>(1, std::min(steps_, first + kResident));
    // In two sums where one would hold all of D: their rounding errors are smaller.
    const int64_t depth = std::max<int64_t>(1, std::min(kDepth, ceil_div(steps_, 2)));
    for (int64_t k = first; k < end; k += depth, next += kDepth / gemm.nr * stride) {
      tile.depth = std::min(depth, steps_ - k);
      if (!direct) convert_rows(w, count, k, tile.depth, converted);
      tile.a = direct ? reinterpret_cast<const S*>(w + k * step) : converted;
      tile.accumulate = k > 0;
      for (int64_t p = 0; p < panels; ++p) {
        tile.soon = tile.b = x + (p * steps_ + k) * gemm.nr;
        tile.c = z + p * z_panel;
        tile.ahead = next + p * piece;
        paired_ ? kernels.pair_tile(tile) : gemm.tile(tile);
      }
    }
  }

  // From one packed panel of weight to the next: a line more than it holds, or the panels, which are written side by
  // side, would share their cache sets.
  int64_t packed_pitch(int64_t steps) const { return steps * kernels.gemm.mr + kLine; }
  int64_t packed_tiles() const { return ceil_div(kSteps, kernels.gemm.mr); }
  int64_t packed_step() const { return packed_tiles() * packed_pitch(kSteps); }

  // Weight rows [begin, begin + count) as left operand of dX^T: `panels` panels [count][mr] from dimension d0 on.
  void pack_weight_by_dim(int64_t begin, int64_t count, int64_t d0, int64_t panels, S* dst) const {
    const In* w = w_ + begin * w_stride_ + d0;
    const int64_t pitch = packed_pitch(count);
    switch (kernels.gemm.mr) {
      case 6:
        return pack_columns<6>(w, w_stride_, count, panels, dim - d0, pitch, dst);
      default:
        return pack_columns<3>(w, w_stride_, count, panels, dim - d0, pitch, dst);
    }
  }

  // Some rows of weight at a time, so that what goes to a panel fills whole lines of it.
  template <int Rows>
  static void pack_columns(const In* w, int64_t stride, int64_t count, int64_t panels, int64_t dims, int64_t pitch,
                           S* dst) {
    const int64_t whole = std::min(panels, dims / Rows);
    for (int64_t first = 0; first < count; first += kLine) {
      const int64_t last = std::min(count, first + kLine);
      for (int64_t i = 0; i < whole; ++i) {
        for (int64_t k = first; k < last; ++k) {
          for (int r = 0; r < Rows; ++r) dst[i * pitch + k * Rows + r] = static_cast<S>(w[k * stride + i * Rows + r]);
        }
      }
      for (int64_t k = first; k < last; ++k) {
        for (int64_t d = whole * Rows; d < panels * Rows; ++d) {
          dst[d / Rows * pitch + k * Rows + d % Rows] = d < dims ? static_cast<S>(w[k * stride + d]) : S(0);
        }
      }
    }
  }

  void add_hidden_gradient_step(int64_t column, int64_t steps, int64_t first, int64_t count, const S* w, const S* dz,
                                int64_t z_panel, int64_t panels, S* dx) const {
    const GemmKernel<S>& gemm = kernels.gemm;
    const int64_t piece = ahead_piece<S>(gemm.nr), stride = w_stride_ * sizeof(In) / sizeof(S);
    const int64_t pieces = ceil_div(count * gemm.mr * sizeof(In) / sizeof(S), piece), slots = steps / gemm.nr;
    const int64_t fetched = kSteps / kAheadSteps * kLineBytes / sizeof(S);
    const S* next = reinterpret_cast<const S*>(w_ + (column + steps) * w_stride_ + first * gemm.mr);
    Tile<S> tile;
    tile.depth = steps;
    tile.a_row = 1;
    tile.a_step = gemm.mr;
    tile.a_jump = 0;
    tile.ldc = gemm.nr;
    tile.accumulate = column > 0;
    tile.ahead_jump = stride - piece;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = p * count + i;
        tile.soon = (p + 1 < panels ? dz + (p + 1) * z_panel : dz + steps * gemm.nr) + i * fetched;
        tile.ahead = next + t / pieces * slots * stride + t % pieces * piece;
        tile.a = w + i * packed_pitch(steps);
        tile.b = dz + p * z_panel;
        tile.c = dx + (p * padded_dim() + (first + i) * gemm.mr) * gemm.nr;
        gemm.tile(tile);
      }
    }
  }

  bool paired_;  // whether the logits are products of pairs of bfloat16
  int64_t steps_;
  const In* x_;
  const In* w_;
  const int64_t* targets_;
  int64_t num_tokens_, x_stride_, w_stride_;
  const S* temperatures_;
  S temperature_, softcap_;
  std::vector<S> bias_;
  int64_t ignore_index_;
};

// A forward pass over the selected rows.
template <typename In, typename S>
FoldedRows<S> fold_rows(const Head<In, S>& head) {
  const int64_t count = head.rows.size(), nr = head.lanes();
  const int64_t panels = ceil_div(count, nr), most = kScoredRows / nr, blocks = ceil_div(panels, most);
  const int64_t splits = ceil_div(head.vocab, kSplit), sweeps = ceil_div(splits, kSweep);
  const Scratch<S> memory({panels * head.x_panel(), max_workers(sweeps * blocks) * kScoredRows * kChunk});
  S *x = memory[0], *logits = memory[1];
  head.pack_hidden(0, count, x);
  FoldedRows<S> folded(head.kernels, panels, splits);
  parallel_workers(sweeps * blocks, [&](int64_t thread, auto next) {
    S* z = logits + thread * kScoredRows * kChunk;
    for (int64_t unit; (unit = next()) < sweeps * blocks;) {
      const int64_t sweep = unit / blocks, first = unit % blocks * most, here = std::min(most, panels - first);
      for (int64_t split = sweep * kSweep; split < std::min(splits, (sweep + 1) * kSweep); ++split) {
        head.fold_split(first * nr, here, split, x + first * head.x_panel(), z, kChunk * nr, false, folded, first);
      }
    }
  });
  folded.merge();
  return folded;
}

// The coefficients of a block of rows, per lane. A lane without a row has coefficients 0 and p = 0.
template <typename S>
class BlockGradient {
 public:
  BlockGradient(int64_t panels, int64_t lanes) : lanes_(lanes), values_(kFields * panels * lanes) {}

  template <typename In>
  void set(const Head<In, S>& head, int64_t row, int64_t height, const RowGradient<S>* rows) {
    for (int64_t p = 0; p * lanes_ < height; ++p) {
      S* at = values_.data() + p * kFields * lanes_;
      S* temperature = at + 5 * lanes_;
      head.temperatures_of(row + p * lanes_, temperature);
      for (int64_t j = 0; j < lanes_; ++j) {
        const int64_t i = p * lanes_ + j;
        const RowGradient<S> g = i < height ? rows[i] : RowGradient<S>{0, 0, std::numeric_limits<S>::infinity(), 0, 0};
        const S fields[] = {g.logprob / temperature[j], g.entropy / temperature[j], g.lse, g.lse_residual, g.h};
        for (int f = 0; f < 5; ++f) at[f * lanes_ + j] = fields[f];
      }
    }
    softcap_ = head.softcap();
  }

  PanelGradient<S> panel(int64_t p) const {
    const S* at = values_.data() + p * kFields * lanes_;
    return {at, at + lanes_, at + 2 * lanes_, at + 3 * lanes_, at + 4 * lanes_, at + 5 * lanes_, softcap_};
  }

 private:
  static constexpr int64_t kFields = 6;
  int64_t lanes_;
  std::vector<S> values_;
  S softcap_ = 0;
};

// dst[i] = src[i] in the gradient's dtype, rounded once.
template <typename Out, typename S>
void round_into(Out* dst, const S* src, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<Out>(src[i]);
}

}  // namespace qrm_fast
