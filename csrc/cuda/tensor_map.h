// Matrices as the copy engine of Hopper reads and writes them.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "../tensors.h"

namespace qrm_fast {

// Boxes of a matrix [rows, columns] of 16-bit elements, in shared memory in rows of 128 bytes. Rows must start at
// multiples of 16 bytes. The driver's function is asked of the runtime: nothing is linked with the driver.
inline CUtensorMap tensor_map(const Tensor& x, CUtensorMapDataType dtype, uint32_t box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                    "the CUDA driver has no cuTensorMapEncodeTiled, which CUDA 12.0 brought");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  constexpr uint32_t kBoxColumns = 64;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(x.size(1)), static_cast<cuuint64_t>(x.size(0))};
  const cuuint64_t stride_bytes[] = {static_cast<cuuint64_t>(x.stride(0)) * 2};
  const cuuint32_t box[] = {kBoxColumns, box_rows}, every[] = {1, 1};
  CUtensorMap map;
  const CUresult error = encode(&map, dtype, 2, const_cast<void*>(x.const_data_ptr()), size, stride_bytes, box, every,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "the CUDA driver refuses a tensor map of [", x.size(0), ", ", x.size(1),
                  "] elements with rows ", x.stride(0), " elements apart: error ", static_cast<int>(error));
  return map;
}

}  // namespace qrm_fast
