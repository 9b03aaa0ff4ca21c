// Launches a scan over packed sequences: a setup kernel that finds where each unit starts and checks the boundaries,
// then the scan (scan_unit.h). The host reads nothing back, and the size of the workspace depends on the number of rows
// alone, so CUDA graphs capture both launches.
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

constexpr int SETUP_BLOCKS = 64;

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
  __device__ void load(int64_t t, int rest, Bits (&bits)[ROWS_PER_THREAD]) const {
    if (dtype_ == ScalarType::Float) {
      load_from(static_cast<const uint32_t*>(data_) + t, rest, bits);
    } else {
      load_from(static_cast<const uint16_t*>(data_) + t, rest, bits);
    }
  }
  __device__ float value(Bits bits) const {
    const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    const float wide = __uint_as_float(dtype_ == ScalarType::Float ? bits : bits << 16);
    return dtype_ == ScalarType::Half ? half : wide;
  }

 private:
  template <typename W>
  __device__ static void load_from(const W* rows, int rest, Bits (&bits)[ROWS_PER_THREAD]) {
    QRM_FAST_UNROLL
    for (int k = 0; k < ROWS_PER_THREAD; ++k) {
      bits[k] = 0;
      if (k * THREADS < rest) bits[k] = rows[k * THREADS];
    }
  }

  const void* data_;
  ScalarType dtype_;
};

template <typename Map>
struct ScanWorkspace {
  Published<Map>*blocks, *groups;  // [units]
  UnitStart* starts;               // [units]
  int64_t* ticket;
  int64_t* broken;  // [SETUP_BLOCKS], whether a block of the setup saw an invalid boundary

  static int64_t num_bytes(int64_t num_units) {
    return num_units * (2 * sizeof(Published<Map>) + sizeof(UnitStart)) + 8 * (1 + SETUP_BLOCKS) + 16;
  }
  ScanWorkspace(void* memory, int64_t num_units) {
    starts = static_cast<UnitStart*>(memory);
    ticket = reinterpret_cast<int64_t*>(starts + num_units);
    broken = ticket + 1;
    blocks = reinterpret_cast<Published<Map>*>(broken + SETUP_BLOCKS);
    groups = blocks + num_units;
  }
};

template <typename Map>
__global__ void scan_setup(DeviceCuSeqlens cu, int64_t num_tokens, int64_t num_units, ScanWorkspace<Map> w) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t u = index; u < num_units; u += stride) {
    w.starts[u] = UnitStart::of(cu, u, num_tokens);
    w.blocks[u].ready = w.groups[u].ready = 0;
  }
  int broken = index == 0 && (cu.raw(0) != 0 || cu.raw(cu.num_sequences()) != num_tokens);
  for (int64_t s = index; s < cu.num_sequences(); s += stride) broken |= cu.raw(s) > cu.raw(s + 1);
  broken = __syncthreads_or(broken);
  if (threadIdx.x == 0) w.broken[blockIdx.x] = broken;
  if (index == 0) *w.ticket = 0;
}

// Blocks per SM: about as many as shared memory holds on sm_90. With more, registers spill.
template <typename Rows>
constexpr int BLOCKS_PER_SM = Rows::kInputs < 3 ? 6 : 4;

template <typename Rules, typename T>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<typename Rules::Rows>)
    scan_units(UnitScan<Rules, T, DeviceCuSeqlens> scan, int64_t num_units,
               ScanWorkspace<typename Rules::Rows::Map> w) {
  __shared__ UnitMemory<typename Rules::Rows> memory;
  __shared__ int64_t taken;
  if (threadIdx.x == 0) taken = atomicAdd(reinterpret_cast<unsigned long long*>(w.ticket), 1ull);
  const bool broken = __syncthreads_or(threadIdx.x < SETUP_BLOCKS && w.broken[threadIdx.x] != 0);
  const int64_t u = num_units - 1 - taken;  // the last unit first: a unit waits only for units behind it
  if (broken) {
    for (int64_t t = u * BLOCK + threadIdx.x; t < min((u + 1) * BLOCK, scan.num_tokens); t += THREADS) {
      for (float* rows : scan.out) rows[t] = NAN;
    }
    return;
  }
  scan.run(memory, u, w.starts[u]);
}

// Columns in, columns out, all [T]; every row is NaN where the boundaries are not those of T packed rows.
template <typename Rules, int kInputs, int kOutputs>
void scan_packed(const Tensor (&in)[kInputs], const Tensor (&out)[kOutputs], const Tensor& cu_seqlens,
                 const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask, const Rules& rules) {
  using Map = typename Rules::Rows::Map;
  const int64_t num_tokens = in[0].size(0), num_units = ceil_div(num_tokens, BLOCK);
  if (num_tokens == 0) return;
  const auto device = in[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Tensor memory = torch::stable::new_empty(in[0], {ScanWorkspace<Map>::num_bytes(num_units)}, ScalarType::Byte);
  const ScanWorkspace<Map> workspace(memory.mutable_data_ptr(), num_units);
  const DeviceCuSeqlens cu(cu_seqlens, num_tokens);
  UnitScan<Rules, FloatingColumn, DeviceCuSeqlens> scan{{},
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
  scan_setup<<<SETUP_BLOCKS, 256, 0, static_cast<cudaStream_t>(stream)>>>(cu, num_tokens, num_units, workspace);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scan_units<<<num_units, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(scan, num_units, workspace);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// All sequences follow one rule.
template <typename R>
struct SameRows {
  using Rows = R;
  Rows rows;
  __device__ const Rows& operator()(int64_t) const { return rows; }
};

}  // namespace qrm_fast
