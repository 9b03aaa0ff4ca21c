// Packed sequence boundaries read on the device: int32 or int64 [S+1]. Nothing can be raised here, so a boundary that a
// CPU kernel would refuse is clamped: no kernel leaves [0, T) whatever the boundaries say.
#pragma once
#include <cstdint>

#include "../tensors.h"

namespace qrm_fast {

class DeviceCuSeqlens {
 public:
  DeviceCuSeqlens(const Tensor& cu_seqlens, int64_t num_tokens)
      : data_(cu_seqlens.const_data_ptr()),
        wide_(cu_seqlens.scalar_type() == ScalarType::Long),
        num_sequences_(cu_seqlens.size(0) - 1),
        num_tokens_(num_tokens) {}

  __device__ int64_t raw(int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }
  // In [0, T]; a sequence whose end precedes its start is empty to every loop from one to the other.
  __device__ int64_t operator[](int64_t i) const {
    const int64_t t = raw(i);
    return t < 0 ? 0 : t > num_tokens_ ? num_tokens_ : t;
  }
  __host__ __device__ int64_t num_sequences() const { return num_sequences_; }

 private:
  const void* data_;
  bool wide_;
  int64_t num_sequences_;
  int64_t num_tokens_;
};

}  // namespace qrm_fast
