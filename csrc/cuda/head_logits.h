// Logits in the accumulators that made them, for the kernels of heads: the formulas of qrm_fast/triton/logits.py.
#pragma once
#include "../tensors.h"
#include "product_tiles.h"

namespace qrm_fast {

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

// What makes logits of products.
struct HeadLogits {
  const void* bias;           // [V] or null
  const float* temperatures;  // [T] or null: all of them are 1
  float softcap;              // 0: none
  int num_rows, vocab;
};

inline HeadLogits head_logits(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& temperatures, std::optional<double> softcap) {
  STD_TORCH_CHECK(!temperatures || temperatures->scalar_type() == ScalarType::Float, "temperatures are float32");
  return {bias ? bias->const_data_ptr() : nullptr, data_or_null<float>(temperatures),
          static_cast<float>(softcap.value_or(0)), static_cast<int>(hidden.size(0)), static_cast<int>(weight.size(0))};
}

// The column of accumulator i within a tile, and which of its lane's two rows it is in: 8 apart, the first one this.
__device__ inline int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
__device__ constexpr int half_of(int i) { return i / 2 % 2; }
__device__ inline int first_row(int warp_row) { return warp_row + threadIdx.x % 32 / 4; }

__device__ inline float temperature_of(const HeadLogits& head, int64_t row) {
  return head.temperatures != nullptr && row < head.num_rows ? head.temperatures[row] : 1;
}

// -inf in columns past the last, z being those from `column` on.
template <int kCount>
__device__ inline void end_columns(float (&z)[kCount], int column, int vocab) {
  if (column + 2 * kCount <= vocab) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + column_of(i) >= vocab) z[i] = -INFINITY;
  }
}

template <int kCount>
__device__ inline void divide_rows(float (&z)[kCount], const float (&temperature)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] = quotient(z[i], temperature[half_of(i)]);
}

// softcap(z + bias) / temperature of columns from `column` on, -inf past the last.
template <typename T>
__device__ inline void finish_logits(const HeadLogits& head, float (&z)[128], int column,
                                     const float (&temperature)[2]) {
  if (head.bias != nullptr) {
    const T* bias = static_cast<const T*>(head.bias) + column;
#pragma unroll
    for (int i = 0; i < 128; i += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int v = column_of(i + c);
        const float b = column + v < head.vocab ? widened(bias[v]) : 0;
        z[i + c] += b;
        z[i + 2 + c] += b;
      }
    }
  }
  if (head.softcap != 0) {
#pragma unroll
    for (float& x : z) x = head.softcap * tanh_fast(quotient(x, head.softcap));
  }
  if (head.temperatures != nullptr) divide_rows(z, temperature);
  end_columns(z, column, head.vocab);
}

__device__ inline uint32_t packed(__half, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
__device__ inline uint32_t packed(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// A warp's rows of a tile, rounded to T, to matrix rows from `row` and columns from `column` on, by way of its boxes.
template <typename T>
__device__ inline void store_tile(const CUtensorMap& out, const float (&x)[128], int row, int column, uint32_t boxes) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int box = 0; box < TILE_COLUMNS / BOX_COLUMNS; ++box) {
    const uint32_t at = boxes + box % BOXES * BOX_BYTES, lane_row = at + lane % WARP_ROWS * 128;
    if (lane == 0) hopper::await_stores<BOXES - 1>();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of pieces of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = box * 32 + pair * 8 + k * 2;
        words[k] = packed(T{}, x[i], x[i + 1]);
      }
      const int piece = 2 * pair + lane / WARP_ROWS;
      hopper::store_matrices(lane_row + ((piece ^ lane % 8) << 4), words);
    }
    hopper::show_to_copies();
    __syncwarp();
    if (lane == 0) hopper::store_box(out, row, column + box * BOX_COLUMNS, at);
  }
}

}  // namespace qrm_fast
