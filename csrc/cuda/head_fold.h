// The fold of a tile of logits into (max, sum, weighted sum) of each row: the formulas of
// qrm_fast/triton/linear_logprobs.py.
#pragma once
#include "head_logits.h"

namespace qrm_fast {

constexpr int SPLIT = 2048;  // columns whose statistics are one

struct HeadFold {
  HeadLogits head;
  const int64_t* targets;  // [T]
  float* statistics;       // [3, splits, T]: maximum, sum and weighted sum of each split
  float* target_logits;    // [T]
  float* tops;             // [tiles of columns, T] or null: what the exponentials that are kept are relative to
  float* running;          // [2, tiles of columns, T] or null: maximum and sum of the split after each tile
};

// One split of the columns, kSplit of them, for the same rows.
template <int kColumns, int kSplit>
class SplitTiles {
 public:
  static constexpr int kWidth = kColumns;
  static_assert(kSplit % kColumns == 0);

  __device__ SplitTiles(int num_rows, int vocab) {
    const Cluster cluster(num_rows, ceil_div(vocab, kSplit));
    const Place place = cluster[cluster.index];
    row_ = cluster.row(place);
    column_ = place.piece * kSplit;
    count = ceil_div(min(kSplit, vocab - column_), kColumns);
  }
  __device__ Tile operator[](int i) const { return {row_, column_ + i * kColumns}; }

  int count;

 private:
  int row_, column_;
};

// Statistics max z, sum e^(z - max), sum (z - max) e^(z - max) of columns of a row; a sum of 0 is no column.
struct Folded {
  float max = -INFINITY, sum = 0, weighted = 0;

  __device__ void merge(float max2, float sum2, float weighted2) {
    const float top = fmaxf(max, max2);
    const float shift = sum == 0 ? 0 : max - top, shift2 = sum2 == 0 ? 0 : max2 - top;
    const float scale = exp_fast(shift), scale2 = exp_fast(shift2);
    weighted = scale * (weighted + shift * sum) + scale2 * (weighted2 + shift2 * sum2);
    sum = scale * sum + scale2 * sum2;
    max = top;
  }
};

// Four lanes have a row.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The largest of a lane's two rows, and what exponentials are relative to.
template <int kCount>
__device__ inline void row_tops(const float (&z)[kCount], float (&top)[2], float (&origin)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) top[half_of(i)] = fmaxf(top[half_of(i)], z[i]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = row_max(top[h]);
    origin[h] = top[h] == -INFINITY ? 0 : top[h];
  }
}

// The two rows of a lane through the tiles of one split, the same rows of each.
template <typename T>
class Fold {
 public:
  using Parameters = HeadFold;
  static constexpr bool kAdded = false;

  __device__ Fold(const HeadFold& p, const CUtensorMap& kept, int warp_row, uint32_t boxes)
      : p_(p), kept_(kept), warp_row_(warp_row), boxes_(boxes) {}

  __device__ void begin(float (&)[128], Tile tile) {
    if (tile.column % SPLIT != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_[h] = first_row(tile.row + warp_row_) + 8 * h;
      target_[h] = row_[h] < p_.head.num_rows ? p_.targets[row_[h]] : -1;
      temperature_[h] = temperature_of(p_.head, row_[h]);
      folded_[h] = {};
    }
  }

  __device__ void end(float (&z)[128], Tile tile) {
    finish_logits<T>(p_.head, z, tile.column, temperature_);
    store_target_logits(z, tile.column);
    float top[2] = {-INFINITY, -INFINITY}, origin[2], sum[2] = {0, 0}, weighted[2] = {0, 0};
    row_tops(z, top, origin);
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      const int h = half_of(i);
      const float shift = z[i] - origin[h];
      z[i] = exp_fast(shift);
      sum[h] += z[i];
      weighted[h] += z[i] * fmaxf(shift, -1000.f);  // where e is 0 the shift may be -inf
    }
    const bool last = tile.column + TILE_COLUMNS >= min((tile.column / SPLIT + 1) * SPLIT, p_.head.vocab);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      folded_[h].merge(top[h], row_sum(sum[h]), row_sum(weighted[h]));
      if (threadIdx.x % 4 != 0 || row_[h] >= p_.head.num_rows) continue;
      const Folded& f = folded_[h];
      store(p_.tops, TILE_COLUMNS, tile.column, row_[h], {origin[h]});
      store(p_.running, TILE_COLUMNS, tile.column, row_[h], {f.max, f.sum});
      if (last) store(p_.statistics, SPLIT, tile.column, row_[h], {f.max, f.sum, f.weighted});
    }
    if (p_.tops != nullptr) store_tile<__half>(kept_, z, tile.row + warp_row_, tile.column, boxes_);
  }

 private:
  __device__ void store_target_logits(const float (&z)[128], int column) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (target_[h] < column || target_[h] >= column + TILE_COLUMNS || row_[h] >= p_.head.num_rows) continue;
      const int here = static_cast<int>(target_[h]) - column;
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        if (half_of(i) == h && column_of(i) == here) p_.target_logits[row_[h]] = z[i];
      }
    }
  }

  // To [values, pieces of `width` columns, T], where there is such.
  template <int kCount>
  __device__ void store(float* to, int width, int column, int64_t row, const float (&values)[kCount]) const {
    if (to == nullptr) return;
    const int64_t piece = column / width, pieces = ceil_div(p_.head.vocab, width);
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[(k * pieces + piece) * p_.head.num_rows + row] = values[k];
  }

  const HeadFold& p_;
  const CUtensorMap& kept_;
  const int warp_row_;
  const uint32_t boxes_;
  int64_t row_[2], target_[2];
  float temperature_[2];
  Folded folded_[2];
};

}  // namespace qrm_fast
