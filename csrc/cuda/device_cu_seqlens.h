// Packed sequence boundaries read on the device: int32 or int64 [S+1]. Nothing can be raised here: scan_launch.h checks
// them before a row is touched.
#pragma once
#include <cstdint>

#include "../tensors.h"

namespace qrm_fast {

class DeviceCuSeqlens {
 public:
  explicit DeviceCuSeqlens(const Tensor& cu_seqlens)
      : data_(cu_seqlens.const_data_ptr()),
        wide_(cu_seqlens.scalar_type() == ScalarType::Long),
        num_sequences_(cu_seqlens.size(0) - 1) {}

  __device__ int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }
  __host__ __device__ int64_t num_sequences() const { return num_sequences_; }

 private:
  const void* data_;
  bool wide_;
  int64_t num_sequences_;
};

}  // namespace qrm_fast
