// Generalised advantage estimation over packed sequences, one warp per sequence.
// Reads rewards, values and mask once, writes advantages and returns once: 16 bytes per token in fp32, and a dozen
// FLOPs. A warp walks its sequence from the end in tiles of 32 rows, so tile borders, and with them every bit, depend
// on the sequence alone and never on the packing. In a tile the recurrence A_t = delta_t + gamma lam A_{t+1} is a scan
// over affine maps (decay, shift); a masked row is the identity map and hands the value of the row after it on. Nothing
// is shared between warps: no atomics, no shared memory.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cu_seqlens.h"
#include "dtypes.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

constexpr int WARP = 32;
constexpr int WARPS = 4;  // per block
constexpr unsigned ALL = 0xffffffffu;

template <typename T>
__device__ void gae_sequence(const T* rewards, const T* values, const bool* mask, int64_t bos, int64_t eos, float gamma,
                             float decay, float bootstrap, float* advantages, float* returns) {
  const int lane = threadIdx.x % WARP;
  float next_value = bootstrap;  // value and advantage of the first counted row after the tile
  float next_advantage = 0;
  for (int64_t end = eos; end > bos; end -= WARP) {
    const int64_t t = end - 1 - lane;  // lane 0 is the last row
    const bool inside = t >= bos;
    const bool counted = inside && (mask == nullptr || mask[t]);
    const float reward = counted ? static_cast<float>(rewards[t]) : 0;
    const float value = counted ? static_cast<float>(values[t]) : 0;

    const unsigned all_counted = __ballot_sync(ALL, counted);
    const unsigned after = all_counted & ((1u << lane) - 1);  // the tile's counted rows after row t
    const float neighbour = __shfl_sync(ALL, value, after ? 31 - __clz(after) : 0);
    const float delta = reward + gamma * (after ? neighbour : next_value) - value;

    float factor = counted ? decay : 1;  // A_t = shift + factor * next_advantage
    float shift = counted ? delta : 0;
    for (int step = 1; step < WARP; step *= 2) {
      const float factor_after = __shfl_up_sync(ALL, factor, step);
      const float shift_after = __shfl_up_sync(ALL, shift, step);
      if (lane >= step) {
        shift += factor * shift_after;
        factor *= factor_after;
      }
    }
    const float advantage = shift + factor * next_advantage;
    if (inside) {
      advantages[t] = counted ? advantage : 0;
      returns[t] = counted ? advantage + value : 0;
    }
    next_advantage = __shfl_sync(ALL, advantage, WARP - 1);
    const float first_value = __shfl_sync(ALL, value, all_counted ? 31 - __clz(all_counted) : 0);
    if (all_counted) next_value = first_value;
  }
}

template <typename T>
__global__ void __launch_bounds__(WARP* WARPS)
    gae_kernel(const T* rewards, const T* values, DeviceCuSeqlens cu, float gamma, float decay, const float* lams,
               const float* bootstrap, const bool* mask, float* advantages, float* returns) {
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * WARPS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; i < cu.num_sequences();
       i += num_warps) {
    gae_sequence(rewards, values, mask, cu[i], cu[i + 1], gamma, lams ? gamma * lams[i] : decay,
                 bootstrap ? bootstrap[i] : 0, advantages, returns);
  }
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double gamma,
                               double lam, const std::optional<Tensor>& lam_per_sequence,
                               const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const torch::stable::accelerator::DeviceGuard guard(rewards.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(rewards.get_device_index(), &stream));
  const int64_t num_tokens = rewards.size(0);
  const DeviceCuSeqlens cu(cu_seqlens, num_tokens);
  Tensor advantages = torch::stable::new_empty(rewards, {num_tokens}, ScalarType::Float);
  Tensor returns = torch::stable::new_empty(rewards, {num_tokens}, ScalarType::Float);
  if (num_tokens == 0 || cu.num_sequences() == 0) return {advantages, returns};
  const int64_t blocks = std::min<int64_t>((cu.num_sequences() + WARPS - 1) / WARPS, 1 << 20);
  dispatch_floating(rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gae_kernel<T><<<blocks, WARP * WARPS, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(rewards.const_data_ptr()), static_cast<const T*>(values.const_data_ptr()), cu, gamma,
        gamma * lam, data_or_null<float>(lam_per_sequence), data_or_null<float>(bootstrap), data_or_null<bool>(mask),
        static_cast<float*>(advantages.mutable_data_ptr()), static_cast<float*>(returns.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("gae", TORCH_BOX(&qrm_fast::gae)); }
