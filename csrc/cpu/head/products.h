// The three products of a head, a chunk of columns of V at a time, while the chunk is in cache:
//   logits  z [v][row] = sum_k W[v, k] X^T[k][row]
//   dX^T    [d][row] (+)= sum_v W^T[d, v] dZ[v][row]
//   dW      [v][d] (+)= sum_row dZ[v][row] X[row][d], and db, its sum over the rows
// 2 T D V FLOP each. Every sum runs in an order that D or V alone sets, so a row's bits are its own. `z_panel` is the
// distance between panels of logits or dZ; nothing of size [T, V] is needed.
#pragma once
#include "../simd/convert.h"
#include "gemm.h"
#include "inputs.h"

namespace qrm_fast {

inline constexpr int64_t kResident = 512;  // steps along D per pass: X^T of 256 rows and so many steps stays in L2
inline constexpr int64_t kChunk = 96;      // columns of V at a time; a multiple of every tile's rows
inline constexpr int64_t kMostRows = 12;   // of a tile
inline constexpr int64_t kSteps = 256;     // columns of V per step of dX
inline constexpr int64_t kGroup = 128;     // columns of D per pass of dW, whose X is read again and again from L2

// The steps [first, first + depth) of `count` rows of weight, [mr][kDepth], zeros beyond.
template <typename In, typename S>
void convert_weight(const Head<In, S>& head, const In* w, int64_t count, int64_t first, int64_t depth, S* dst) {
  for (int64_t r = 0; r < head.kernels.gemm.mr; ++r, dst += kDepth, w += head.weight_stride) {
    if (r < count && head.paired) {
      for (int64_t k = 0; k < depth; ++k) dst[k] = head.pair(w, first + k);
    } else if (r < count) {
      convert(w + first, depth, dst);
    } else {
      std::fill_n(dst, depth, S(0));
    }
  }
}

// z (+)= `count` weight rows, one tile high, times the panels of x, over kResident steps from `first` on.
template <typename In, typename S>
void add_tile_row_of_logits(const Head<In, S>& head, int64_t column, int64_t count, int64_t first, int64_t panels,
                            const S* x, S* z, int64_t z_panel) {
  const GemmKernel<S>& gemm = head.kernels.gemm;
  const In* w = head.weight + column * head.weight_stride;
  const bool whole = std::is_same_v<In, S> || (head.paired && head.dim % 2 == 0 && head.weight_stride % 2 == 0);
  const bool direct = whole && count == gemm.mr;
  const int64_t piece = ahead_piece<S>(gemm.nr), stride = head.weight_stride * sizeof(In) / sizeof(S);
  const int64_t step = head.paired ? 2 : 1;
  // Beyond the last row only a hint.
  const S* next = reinterpret_cast<const S*>(w + gemm.mr * head.weight_stride + first * step);
  S converted[kMostRows * kDepth];
  Tile<S> tile;
  tile.a_row = direct ? stride : kDepth;
  tile.a_step = 1;
  tile.a_jump = 0;
  tile.ldc = gemm.nr;
  tile.ahead_jump = stride - piece;
  const int64_t end = std::max<int64_t>(1, std::min(head.steps, first + kResident));
  // In two sums where one would hold all of D: their rounding errors are smaller.
  const int64_t depth = std::max<int64_t>(1, std::min(kDepth, ceil_div(head.steps, 2)));
  for (int64_t k = first; k < end; k += depth, next += kDepth / gemm.nr * stride) {
    tile.depth = std::min(depth, head.steps - k);
    if (!direct) convert_weight(head, w, count, k, tile.depth, converted);
    tile.a = direct ? reinterpret_cast<const S*>(w + k * step) : converted;
    tile.accumulate = k > 0;
    for (int64_t p = 0; p < panels; ++p) {
      tile.soon = tile.b = x + (p * head.steps + k) * gemm.nr;
      tile.c = z + p * z_panel;
      tile.ahead = next + p * piece;
      head.paired ? head.kernels.pair_tile(tile) : gemm.tile(tile);
    }
  }
}

// Finished logits of `width` columns from `column` on and the rows of `panels` panels from `row` on, packed in `x`.
// Panel p goes to z + p * z_panel; lines up to the next multiple of mr beyond `width` are overwritten.
template <typename In, typename S>
void form_logits(const Head<In, S>& head, int64_t row, int64_t panels, int64_t column, int64_t width, const S* x, S* z,
                 int64_t z_panel) {
  const GemmKernel<S>& gemm = head.kernels.gemm;
  for (int64_t k = 0; k == 0 || k < head.steps; k += kResident) {
    for (int64_t i = 0; i < width; i += gemm.mr) {
      add_tile_row_of_logits(head, column + i, std::min(gemm.mr, width - i), k, panels, x, z + i * gemm.nr, z_panel);
    }
  }
  if (head.logits_are_products()) return;
  for (int64_t p = 0; p < panels; ++p) {
    S temperature[kLargestTile];
    head.temperatures_of(row + p * gemm.nr, temperature);
    const S* bias = head.bias.empty() ? nullptr : head.bias.data() + column;
    head.kernels.finish(z + p * z_panel, width, {bias, head.softcap, temperature});
  }
}

// Some rows of weight at a time, so that what goes to a panel [count][Rows] fills whole lines of it.
template <int Rows, typename In, typename S>
void pack_columns(const In* w, int64_t stride, int64_t count, int64_t panels, int64_t dims, int64_t pitch, S* dst) {
  constexpr int64_t kLine = Head<In, S>::kLine;
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

// The left operand of dX^T: `steps` rows of weight as panels [steps][mr], packed for `tiles` tiles at a time.
template <typename In, typename S>
struct PackedWeight {
  explicit PackedWeight(const Head<In, S>& head)
      : mr(head.kernels.gemm.mr), tiles(ceil_div(kSteps, mr)), size(tiles * pitch(kSteps)) {}

  // From one panel to the next: a line more than it holds, or the panels, which are written side by side, would share
  // their cache sets.
  int64_t pitch(int64_t steps) const { return steps * mr + Head<In, S>::kLine; }

  // Weight rows [begin, begin + steps) from dimension d0 on.
  void pack(const Head<In, S>& head, int64_t begin, int64_t steps, int64_t d0, int64_t panels, S* dst) const {
    const In* w = head.weight + begin * head.weight_stride + d0;
    (mr == 6 ? pack_columns<6, In, S> : pack_columns<3, In, S>)(w, head.weight_stride, steps, panels, head.dim - d0,
                                                                pitch(steps), dst);
  }

  int64_t mr, tiles, size;
};

// dX^T (+)= the packed weight, tiles [first, first + count) of D, times dZ, for one step.
template <typename In, typename S>
void add_step_of_hidden_gradient(const Head<In, S>& head, int64_t column, int64_t steps, int64_t first, int64_t count,
                                 const S* w, int64_t pitch, const S* dz, int64_t z_panel, int64_t panels, S* dx) {
  const GemmKernel<S>& gemm = head.kernels.gemm;
  const int64_t piece = ahead_piece<S>(gemm.nr), stride = head.weight_stride * sizeof(In) / sizeof(S);
  const int64_t pieces = ceil_div(count * gemm.mr * sizeof(In) / sizeof(S), piece), slots = steps / gemm.nr;
  const int64_t fetched = kSteps / kAheadSteps * kLineBytes / sizeof(S);
  const S* next = reinterpret_cast<const S*>(head.weight + (column + steps) * head.weight_stride + first * gemm.mr);
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
      tile.a = w + i * pitch;
      tile.b = dz + p * z_panel;
      tile.c = dx + (p * head.padded_dim() + (first + i) * gemm.mr) * gemm.nr;
      gemm.tile(tile);
    }
  }
}

template <typename In, typename S>
int64_t hidden_gradient_scratch(const Head<In, S>& head) {
  return max_workers(ceil_div(head.dim, head.kernels.gemm.mr)) * PackedWeight<In, S>(head).size;
}

// dX^T, panels [padded_dim()][lanes], (+)= W^T dZ over `columns` columns from `column` on. A thread owns some of D;
// sums run through V in fixed steps. `w`: [hidden_gradient_scratch()].
template <typename In, typename S>
void add_hidden_gradient(const Head<In, S>& head, int64_t column, int64_t columns, const S* dz, int64_t z_panel,
                         int64_t panels, S* w, S* dx) {
  const PackedWeight<In, S> packing(head);
  const int64_t mr = packing.mr, tiles = ceil_div(head.dim, mr), threads = max_workers(tiles);
  parallel(threads, [&](int64_t thread) {
    const int64_t begin = tiles * thread / threads, end = tiles * (thread + 1) / threads;
    S* packed = w + thread * packing.size;
    for (int64_t first = begin; first < end; first += packing.tiles) {
      const int64_t count = std::min(packing.tiles, end - first);
      for (int64_t k = 0; k < columns; k += kSteps) {
        const int64_t steps = std::min(kSteps, columns - k);
        packing.pack(head, column + k, steps, first * mr, count, packed);
        add_step_of_hidden_gradient(head, column + k, steps, first, count, packed, packing.pitch(steps),
                                    dz + k * head.lanes(), z_panel, panels, dx);
      }
    }
  });
}

// dW [width, D] (+)= dZ X for one chunk, of `height` rows.
template <typename In, typename S>
void add_weight_gradient(const Head<In, S>& head, int64_t width, const S* dz, int64_t z_panel, int64_t height,
                         const S* x_by_dim, S* dw, bool accumulate) {
  const GemmKernel<S>& gemm = head.kernels.gemm;
  const int64_t dim = head.dim, piece = ahead_piece<S>(gemm.nr), slots = std::max<int64_t>(1, height / gemm.nr);
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
template <typename S>
void add_bias_gradient(int64_t width, const S* dz, int64_t z_panel, int64_t height, int64_t lanes, double* db) {
  for (int64_t row = 0; row < height; row += lanes, dz += z_panel) {
    const int64_t filled = std::min(lanes, height - row);
    for (int64_t v = 0; v < width; ++v) {
      for (int64_t j = 0; j < filled; ++j) db[v] += dz[v * lanes + j];
    }
  }
}

}  // namespace qrm_fast
