// Launches a scan over packed sequences: a setup kernel that checks the boundaries, then the scan (scan_unit.h). The
// host reads nothing back, and the size of the workspace depends on the number of rows alone, so CUDA graphs capture
// both launches.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../dtypes.h"
#include "device_cu_seqlens.h"
#include "scan_unit.h"

namespace qrm_fast {

constexpr int MOST_SETUP_BLOCKS = 64, SETUP_THREADS = 256;

// Rows of any floating dtype, loaded as bits and converted afterwards, so that all loads are in flight at once. The
// branch on the dtype is uniform; a kernel per dtype would be no faster.
class FloatingColumn {
 public:
  using Bits = uint32_t;

  FloatingColumn() = default;
  explicit FloatingColumn(const Tensor& x) : data_(x.const_data_ptr()), dtype_(x.scalar_type()) {
    STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half,
                    "the public function admits only floating dtypes other than float64");
  }
  // Rows t, t + THREADS, ...: all of them, or those below t + rest.
  template <bool kAll, int kRows>
  __device__ void load(int64_t t, int rest, Bits (&bits)[kRows]) const {
    if (dtype_ == ScalarType::Float) {
      load_from<kAll>(static_cast<const uint32_t*>(data_) + t, rest, bits);
    } else {
      load_from<kAll>(static_cast<const uint16_t*>(data_) + t, rest, bits);
    }
  }
  // To float32.
  template <int kRows>
  __device__ void widen(Bits (&bits)[kRows]) const {
    if (dtype_ == ScalarType::Float) return;
    QRM_FAST_UNROLL
    for (Bits& x : bits) {
      const __half half = __ushort_as_half(static_cast<unsigned short>(x));
      x = dtype_ == ScalarType::Half ? __float_as_uint(__half2float(half)) : x << 16;
    }
  }
  __device__ static float value(Bits bits) { return __uint_as_float(bits); }

 private:
  template <bool kAll, typename W, int kRows>
  __device__ static void load_from(const W* rows, int rest, Bits (&bits)[kRows]) {
    QRM_FAST_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (kAll || k * THREADS < rest) bits[k] = rows[k * THREADS];
    }
  }

  const void* data_;
  ScalarType dtype_;
};

template <typename Map>
struct ScanWorkspace {
  Published<Map>*blocks, *groups;  // [units]
  int64_t* ticket;
  int64_t* broken;  // [num_setup_blocks], whether a block of the setup saw an invalid boundary
  int num_setup_blocks;

  static int64_t num_bytes(int64_t num_units) {
    return num_units * 2 * sizeof(Published<Map>) + 8 * (1 + MOST_SETUP_BLOCKS);
  }
  ScanWorkspace(void* memory, int64_t num_units, int64_t num_sequences) {
    ticket = static_cast<int64_t*>(memory);
    broken = ticket + 1;
    blocks = reinterpret_cast<Published<Map>*>(broken + MOST_SETUP_BLOCKS);
    groups = blocks + num_units;
    const int64_t wanted = ceil_div(std::max(num_units, num_sequences), SETUP_THREADS);
    num_setup_blocks = static_cast<int>(std::min<int64_t>(wanted, MOST_SETUP_BLOCKS));
  }
};

template <typename Map>
__global__ void scan_setup(DeviceCuSeqlens cu, int64_t num_tokens, int64_t num_units, ScanWorkspace<Map> w) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t u = index; u < num_units; u += stride) w.blocks[u].ready = w.groups[u].ready = 0;
  int broken = index == 0 && (cu[0] != 0 || cu[cu.num_sequences()] != num_tokens);
  for (int64_t s = index; s < cu.num_sequences(); s += stride) broken |= cu[s] > cu[s + 1];
  broken = __syncthreads_or(broken);
  if (threadIdx.x == 0) w.broken[blockIdx.x] = broken;
  if (index == 0) *w.ticket = 0;
}

// Blocks per SM: about as many as shared memory holds on sm_90. With more, registers spill.
template <typename Rows>
constexpr int BLOCKS_PER_SM = Rows::kInputs < 3 ? 6 : 4;

// The sequences of rows t and `later`, found by a warp: each step asks for 32 boundaries of either. Valid boundaries
// only; of others no more is read than there is.
__device__ inline void find_sequences(const DeviceCuSeqlens& cu, int64_t t, int64_t later, int64_t (&found)[2]) {
  const int64_t rows[2] = {t, later};
  found[0] = found[1] = 0;
  for (int64_t range = cu.num_sequences(); range > 1;) {  // sequences that may be meant, from `found` on
    const int64_t stride = ceil_div(range, 32);
    QRM_FAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t s = found[i] + threadIdx.x * stride;
      const bool begun = threadIdx.x > 0 && s < cu.num_sequences() && cu[s] <= rows[i];
      found[i] += __popc(__ballot_sync(~0u, begun)) * stride;
    }
    range = stride;
  }
}

template <typename Rules, bool kMasked>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<typename Rules::Rows>)
    scan_units(UnitScan<Rules, kMasked, FloatingColumn, DeviceCuSeqlens> scan, int64_t num_units,
               ScanWorkspace<typename Rules::Rows::Map> w) {
  __shared__ UnitMemory<typename Rules::Rows> memory;
  __shared__ int64_t u;
  __shared__ UnitRows unit;
  if (threadIdx.x < 32) {
    unsigned long long ticket = 0;
    if (threadIdx.x == 0) ticket = atomicAdd(reinterpret_cast<unsigned long long*>(w.ticket), 1ull);
    // the last unit first: a unit waits only for units behind it
    const int64_t own = num_units - 1 - static_cast<int64_t>(__shfl_sync(~0u, ticket, 0));
    const int64_t high = min((own + 1) * BLOCK, scan.num_tokens);
    int64_t sequences[2];
    find_sequences(scan.cu, own * BLOCK, high - 1, sequences);
    if (threadIdx.x == 0) {
      u = own;
      if (scan.cu.num_sequences() > 0) unit = UnitRows::of(scan.cu, sequences[0], sequences[1], high);
    }
  }
  const bool broken = __syncthreads_or(threadIdx.x < w.num_setup_blocks && w.broken[threadIdx.x] != 0);
  if (broken) {
    for (int64_t t = u * BLOCK + threadIdx.x; t < min((u + 1) * BLOCK, scan.num_tokens); t += THREADS) {
      for (float* rows : scan.out) rows[t] = NAN;
    }
    return;
  }
  scan.run(memory, u, unit);
}

template <bool kMasked, typename Rules, int kInputs, int kOutputs>
void launch_scan(const Tensor (&in)[kInputs], const Tensor (&out)[kOutputs], const Tensor& cu_seqlens,
                 const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask, const Rules& rules) {
  using Map = typename Rules::Rows::Map;
  const int64_t num_tokens = in[0].size(0), num_units = ceil_div(num_tokens, BLOCK);
  const auto device = in[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Tensor memory = torch::stable::new_empty(in[0], {ScanWorkspace<Map>::num_bytes(num_units)}, ScalarType::Byte);
  const ScanWorkspace<Map> workspace(memory.mutable_data_ptr(), num_units, cu_seqlens.size(0) - 1);
  const DeviceCuSeqlens cu(cu_seqlens);
  UnitScan<Rules, kMasked, FloatingColumn, DeviceCuSeqlens> scan{{},
                                                                 {},
                                                                 data_or_null<bool>(mask),
                                                                 data_or_null<float>(bootstrap),
                                                                 rules,
                                                                 cu,
                                                                 num_tokens,
                                                                 workspace.blocks,
                                                                 workspace.groups};
  for (int i = 0; i < kInputs; ++i) scan.in[i] = FloatingColumn(in[i]);
  for (int i = 0; i < kOutputs; ++i) scan.out[i] = mutable_data<float>(out[i]);
  scan_setup<<<workspace.num_setup_blocks, SETUP_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(cu, num_tokens,
                                                                                                  num_units, workspace);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scan_units<<<num_units, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(scan, num_units, workspace);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Columns in, columns out, all [T]; every row is NaN where the boundaries are not those of T packed rows.
template <typename Rules, int kInputs, int kOutputs>
void scan_packed(const Tensor (&in)[kInputs], const Tensor (&out)[kOutputs], const Tensor& cu_seqlens,
                 const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask, const Rules& rules) {
  if (in[0].size(0) == 0) return;
  if (mask) {
    launch_scan<true>(in, out, cu_seqlens, bootstrap, mask, rules);
  } else {
    launch_scan<false>(in, out, cu_seqlens, bootstrap, mask, rules);
  }
}

// All sequences follow one rule.
template <typename R>
struct SameRows {
  using Rows = R;
  Rows rows;
  __device__ const Rows& operator()(int64_t) const { return rows; }
};

}  // namespace qrm_fast
