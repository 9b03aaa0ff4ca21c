// Packed sequence boundaries: int32 or int64 [S+1], read as int64 without a copy.
#pragma once
#include <atomic>
#include <cstdint>

#include "../../check.h"
#include "../../indices.h"
#include "../../tensors.h"
#include "../simd/instruction_set.h"

namespace qrm_fast {

template <typename I>
QRM_FAST_CLONES static bool never_decreases(const I* x, int64_t begin, int64_t end) {
  I decreases = 0;
  for (int64_t i = begin; i < end; ++i) decreases |= x[i] > x[i + 1] ? 1 : 0;
  return decreases == 0;
}

// x[0] <= x[1] <= ... <= x[count]
template <typename I>
bool never_decreases(const I* x, int64_t count) {
  std::atomic<bool> sorted{true};
  torch::stable::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
    if (!never_decreases(x, begin, end)) sorted = false;
  });
  return sorted;
}

class CuSeqlens {
 public:
  // Throws ValueError unless the boundaries start at 0, never decrease and end at num_tokens.
  CuSeqlens(const Tensor& cu_seqlens, int64_t num_tokens, const char* name = "cu_seqlens")
      : data_(cu_seqlens.const_data_ptr()),
        wide_(cu_seqlens.scalar_type() == ScalarType::Long),
        num_sequences_(cu_seqlens.size(0) - 1) {
    CHECK_VALUE((*this)[0] == 0, name, " must start at 0, got ", (*this)[0]);
    const bool sorted = wide_ ? never_decreases(static_cast<const int64_t*>(data_), num_sequences_)
                              : never_decreases(static_cast<const int32_t*>(data_), num_sequences_);
    for (int64_t i = 0; !sorted && i < num_sequences_; ++i) {
      CHECK_VALUE((*this)[i] <= (*this)[i + 1], name, " must not decrease, got ", (*this)[i], " then ", (*this)[i + 1],
                  " at index ", i + 1);
    }
    CHECK_VALUE((*this)[num_sequences_] == num_tokens, name, " must end at the number of packed rows, ", num_tokens,
                ", got ", (*this)[num_sequences_]);
  }

  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }
  int64_t num_sequences() const { return num_sequences_; }

 private:
  const void* data_;
  bool wide_;
  int64_t num_sequences_;
};

}  // namespace qrm_fast
