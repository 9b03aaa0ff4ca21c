// Launches of kernels that multiply tiles (product_tiles.h), by clusters of two blocks with different rows.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "product_tiles.h"
#include "tensor_map.h"

namespace qrm_fast {

// Calls f with a value of the 16-bit type and its name for the copy engine.
template <typename F>
void dispatch_halves(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::BFloat16) {
    f(__nv_bfloat16{}, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half, "tensor cores multiply 16-bit inputs here");
    f(__half{}, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  }
}

// A factor of which a block loads `rows` rows or columns at a time.
inline CUtensorMap factor_map(const Tensor& x, CUtensorMapDataType dtype, Depth depth, int rows) {
  return tensor_map(x, dtype, depth == Depth::Along ? rows : DEPTH);
}

// One cluster for every place, of 256 rows and a piece of the columns; `resident`: no more than run at a time, which go
// from place to place. Rows of one block have nobody to share with.
template <typename... Parameters, typename... Arguments>
void launch_product(void (*kernel)(Parameters...), const Tensor& on, int64_t num_rows, int64_t pieces, bool resident,
                    const Arguments&... arguments) {
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int64_t blocks = ceil_div(num_rows, TILE_ROWS), shared_by = std::min<int64_t>(blocks, 2);
  int64_t clusters = ceil_div(blocks, shared_by) * pieces;
  if (resident) {
    int processors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    clusters = std::min(clusters, processors / shared_by);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shared_by), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(clusters * shared_by);
  config.blockDim = PRODUCT_THREADS;
  config.dynamicSmemBytes = PRODUCT_BYTES;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, PRODUCT_BYTES));
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace qrm_fast
