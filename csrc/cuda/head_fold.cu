// The fold of a vocabulary head's logits for sm_90a: what qrm_fast/triton/linear_logprobs.py gives Hopper's 16-bit
// inputs to. A tile of hidden @ weight.T becomes logits in the accumulators that made it (bias, softcap, temperature),
// and there (max, sum, weighted sum) of its columns: no logit is rounded to 16 bits, none is written but, where the
// loss asks for them, as exponentials. 2 T D V FLOP. A cluster of two blocks multiplies 256 rows with one split of the
// vocabulary, 2048 columns cut from V alone; 8 clusters with other rows go through one split before the next, so that
// weight and hidden tiles of a wave stay in L2. A row's bits depend on that row, weight and bias alone.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "head_fold.h"
#include "tensor_map.h"

namespace qrm_fast {
namespace {

template <typename T>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1)
    head_fold(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
              const __grid_constant__ CUtensorMap kept, const __grid_constant__ HeadFold p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  const uint32_t memory =
      (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  const uint32_t rank = hopper::rank_in_cluster(), blocks = hopper::blocks_in_cluster();
  constexpr int kGroup = 8;
  const int clusters = ceil_div(ceil_div(p.num_rows, TILE_ROWS), blocks), splits = ceil_div(p.vocab, SPLIT);
  const int cluster = blockIdx.x / blocks, first = cluster / (kGroup * splits) * kGroup;
  const int height = min(clusters - first, kGroup), within = cluster - first * splits;
  const int row = ((first + within % height) * blocks + rank) * TILE_ROWS, split = within / height;
  const int begin = split * SPLIT, end = min(begin + SPLIT, p.vocab);

  Ring ring(memory);
  if (threadIdx.x == 0) {
    hopper::fetch_map(hidden);
    hopper::fetch_map(weight);
    ring.init(blocks);
  }
  hopper::cluster_barrier();
  if (threadIdx.x < GROUP_THREADS) {
    hopper::give_up_registers<LOADING_REGISTERS>();
    if (threadIdx.x == 0) {
      for (int column = begin; column < end; column += TILE_COLUMNS) {
        load_tile(ring, hidden, weight, row, column, p.dim, rank, blocks);
      }
    }
  } else {
    hopper::take_registers<MULTIPLYING_REGISTERS>();
    const int warp = threadIdx.x / 32 - GROUP_THREADS / 32, group = warp / 4, warp_row = row + warp * WARP_ROWS;
    const uint32_t boxes = memory + BOXES_AT + warp * BOXES * BOX_BYTES;
    RowsFold<T> rows(p, warp_row);
    if (group > 0) {
      const int pieces = ceil_div(end - begin, TILE_COLUMNS) * ceil_div(p.dim, DEPTH);
      hopper::await(ring.filled(min(pieces, STAGES) - 1), 0);
    }
    float z[128];
    for (int column = begin; column < end; column += TILE_COLUMNS) {
      multiply_tile<T>(ring, z, group, p.dim, blocks);
      rows.fold(z, column);
      if (p.tops != nullptr) keep(kept, z, warp_row, column, boxes);
    }
    rows.store_statistics(split);
    hopper::await_stores<0>();
  }
  // a block that ended could no longer be arrived at by the other one
  __syncwarp();
  hopper::cluster_barrier();
#else
  __trap();
#endif
}

template <typename T>
void launch(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& kept, CUtensorMapDataType dtype,
            const HeadFold& p) {
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(hidden.get_device_index(), &stream));
  const CUtensorMap rows = tensor_map(hidden, dtype, TILE_ROWS), columns = tensor_map(weight, dtype, TILE_COLUMNS / 2);
  const CUtensorMap box = kept ? tensor_map(*kept, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, WARP_ROWS) : CUtensorMap{};
  // a single block of rows has nobody to share with
  const int64_t blocks = ceil_div(p.num_rows, TILE_ROWS), shared_by = std::min<int64_t>(blocks, 2);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shared_by), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(round_up(blocks, shared_by) * ceil_div(p.vocab, SPLIT));
  config.blockDim = PRODUCT_THREADS;
  config.dynamicSmemBytes = PRODUCT_BYTES;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaFuncSetAttribute(head_fold<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, PRODUCT_BYTES));
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, head_fold<T>, rows, columns, box, p));
}

// The arguments of fold() in qrm_fast/triton/linear_logprobs.py, which see: contiguous but for hidden, weight and kept,
// whose rows start at multiples of 16 bytes. `kept` and `tops` come together.
void head_fold_op(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& temperatures, std::optional<double> softcap, const Tensor& statistics,
                  const Tensor& target_logits, const std::optional<Tensor>& kept, const std::optional<Tensor>& tops,
                  const std::optional<Tensor>& running) {
  const auto data_of = [](const std::optional<Tensor>& x) { return x ? mutable_data<float>(*x) : nullptr; };
  const HeadFold p{data<int64_t>(targets),
                   bias ? bias->const_data_ptr() : nullptr,
                   data_or_null<float>(temperatures),
                   static_cast<float>(softcap.value_or(0)),
                   mutable_data<float>(statistics),
                   mutable_data<float>(target_logits),
                   data_of(tops),
                   data_of(running),
                   static_cast<int>(hidden.size(0)),
                   static_cast<int>(weight.size(0)),
                   static_cast<int>(hidden.size(1))};
  STD_TORCH_CHECK(statistics.size(1) == ceil_div(p.vocab, SPLIT), "a split of the vocabulary has ", SPLIT, " columns");
  STD_TORCH_CHECK(!tops || tops->size(0) == ceil_div(p.vocab, TILE_COLUMNS), "a tile has ", TILE_COLUMNS, " columns");
  STD_TORCH_CHECK(!running || running->size(1) == ceil_div(p.vocab, TILE_COLUMNS), "a tile has ", TILE_COLUMNS,
                  " columns");
  STD_TORCH_CHECK(!temperatures || temperatures->scalar_type() == ScalarType::Float, "temperatures are float32");
  STD_TORCH_CHECK(kept.has_value() == tops.has_value(), "exponentials are kept together with their tops");
  if (hidden.scalar_type() == ScalarType::BFloat16) {
    launch<__nv_bfloat16>(hidden, weight, kept, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, p);
  } else {
    STD_TORCH_CHECK(hidden.scalar_type() == ScalarType::Half, "the fold multiplies 16-bit inputs");
    launch<__half>(hidden, weight, kept, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p);
  }
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("head_fold", TORCH_BOX(&qrm_fast::head_fold_op)); }
