// What becomes of a tile of products: logits in the accumulators that made them, and their fold into (max, sum,
// weighted sum) of each row. The formulas are those of qrm_fast/triton/linear_logprobs.py and logits.py.
#pragma once
#include "../indices.h"
#include "head_product.h"

namespace qrm_fast {

constexpr int SPLIT = 2048;  // columns whose statistics are one

struct HeadFold {
  const int64_t* targets;     // [T]
  const void* bias;           // [V] or null
  const float* temperatures;  // [T] or null: all of them are 1
  float softcap;              // 0: none
  float* statistics;          // [3, splits, T]: maximum, sum and weighted sum of each split
  float* target_logits;       // [T]
  float* tops;                // [tiles of columns, T] or null: what the exponentials that are kept are relative to
  float* running;             // [2, tiles of columns, T] or null: maximum and sum of the split after each tile
  int num_rows, vocab, dim;
};

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float exp_fast(float x) { return exp2_fast(1.4426950408889634f * x); }
__device__ inline float quotient(float x, float y) {
  float q;
  asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(x), "f"(y));
  return q;
}

__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// As in qrm_fast/triton/logits.py, to the bit: linear_sample finds its token among logits of that one.
__device__ inline float tanh_fast(float x) {
  const float e = exp2_fast(-2.8853900817779268f * fabsf(x)), far = quotient(1 - e, 1 + e), s = x * x;
  const float series = fmaf(s, fmaf(s, fmaf(s, 62.f / 2835, -17.f / 315), 2.f / 15), -1.f / 3);
  return fabsf(x) < 0.25f ? fmaf(x * s, series, x) : x < 0 ? -far : far;
}

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

// The two rows of a lane, first + 8 h, through the tiles of one split.
template <typename T>
class RowsFold {
 public:
  __device__ RowsFold(const HeadFold& p, int64_t row) : p_(p) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_[h] = row + threadIdx.x % 32 / 4 + 8 * h;
      target_[h] = row_[h] < p.num_rows ? p.targets[row_[h]] : -1;
      temperature_[h] = p.temperatures != nullptr && row_[h] < p.num_rows ? p.temperatures[row_[h]] : 1;
    }
  }

  // Accumulators of columns from `column` on become exponentials.
  __device__ void fold(float (&z)[128], int column) {
    finish_logits(z, column);
    store_target_logits(z, column);
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 128; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], z[i]);
    float origin[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = row_max(top[h]);
      origin[h] = top[h] == -INFINITY ? 0 : top[h];
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      const int h = i / 2 % 2;
      const float shift = z[i] - origin[h];
      z[i] = exp_fast(shift);
      sum[h] += z[i];
      weighted[h] += z[i] * fmaxf(shift, -1000.f);  // where e is 0 the shift may be -inf
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      folded_[h].merge(top[h], row_sum(sum[h]), row_sum(weighted[h]));
      if (threadIdx.x % 4 != 0 || row_[h] >= p_.num_rows) continue;
      const int64_t tile = column / TILE_COLUMNS, tiles = ceil_div(p_.vocab, TILE_COLUMNS);
      if (p_.tops != nullptr) p_.tops[tile * p_.num_rows + row_[h]] = origin[h];
      if (p_.running != nullptr) {
        p_.running[tile * p_.num_rows + row_[h]] = folded_[h].max;
        p_.running[(tiles + tile) * p_.num_rows + row_[h]] = folded_[h].sum;
      }
    }
  }

  __device__ void store_statistics(int64_t split) const {
    const int64_t splits = ceil_div(p_.vocab, SPLIT);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (threadIdx.x % 4 != 0 || row_[h] >= p_.num_rows) continue;
      const float values[3] = {folded_[h].max, folded_[h].sum, folded_[h].weighted};
#pragma unroll
      for (int k = 0; k < 3; ++k) p_.statistics[(k * splits + split) * p_.num_rows + row_[h]] = values[k];
    }
  }

 private:
  // The column of accumulator i within the tile.
  __device__ static int place(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

  __device__ void finish_logits(float (&z)[128], int column) const {
    if (p_.bias != nullptr) {
      const T* bias = static_cast<const T*>(p_.bias) + column;
#pragma unroll
      for (int i = 0; i < 128; i += 4) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float b = column + place(i + c) < p_.vocab ? widened(bias[place(i + c)]) : 0;
          z[i + c] += b;
          z[i + 2 + c] += b;
        }
      }
    }
    if (p_.softcap != 0) {
#pragma unroll
      for (int i = 0; i < 128; ++i) z[i] = p_.softcap * tanh_fast(quotient(z[i], p_.softcap));
    }
    if (p_.temperatures != nullptr) {
#pragma unroll
      for (int i = 0; i < 128; ++i) z[i] = quotient(z[i], temperature_[i / 2 % 2]);
    }
    if (column + TILE_COLUMNS > p_.vocab) {
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        if (column + place(i) >= p_.vocab) z[i] = -INFINITY;
      }
    }
  }

  __device__ void store_target_logits(const float (&z)[128], int column) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (target_[h] < column || target_[h] >= column + TILE_COLUMNS || row_[h] >= p_.num_rows) continue;
      const int here = static_cast<int>(target_[h]) - column;
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        if (i / 2 % 2 == h && place(i) == here) p_.target_logits[row_[h]] = z[i];
      }
    }
  }

  const HeadFold& p_;
  int64_t row_[2], target_[2];
  float temperature_[2];
  Folded folded_[2];
};

// Exponentials of a warp's rows of a tile, rounded to float16, by way of its boxes in shared memory.
__device__ inline void keep(const CUtensorMap& kept, const float (&e)[128], int row, int column, uint32_t boxes) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int box = 0; box < TILE_COLUMNS / BOX_COLUMNS; ++box) {
    const uint32_t at = boxes + box % BOXES * BOX_BYTES, lane_row = at + lane % WARP_ROWS * 128;
    if (lane == 0) hopper::await_stores<BOXES - 1>();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of pieces of 8 columns
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = box * 32 + pair * 8 + k * 2;
        const __half2 both = __floats2half2_rn(e[i], e[i + 1]);
        x[k] = reinterpret_cast<const uint32_t&>(both);
      }
      const int piece = 2 * pair + lane / WARP_ROWS;
      hopper::store_matrices(lane_row + ((piece ^ lane % 8) << 4), x);
    }
    hopper::show_to_copies();
    __syncwarp();
    if (lane == 0) hopper::store_box(kept, row, column + box * BOX_COLUMNS, at);
  }
}

}  // namespace qrm_fast
