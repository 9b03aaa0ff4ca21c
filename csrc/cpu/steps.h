// Steps of packed sequences: the rows where one ends, int32 or int64 [K], read as int64 without a copy. A step begins
// after the previous one of its sequence; rows after a sequence's last step end belong to none.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../check.h"
#include "cu_seqlens.h"

namespace qrm_fast {

class Steps {
 public:
  // Throws ValueError unless the ends ascend strictly within [0, num_tokens).
  Steps(const torch::stable::Tensor& step_ends, const CuSeqlens& cu, int64_t num_tokens)
      : data_(step_ends.const_data_ptr()),
        wide_(step_ends.scalar_type() == torch::headeronly::ScalarType::Long),
        cu_(cu),
        first_(cu.num_sequences() + 1) {
    const int64_t num_steps = step_ends.size(0);
    for (int64_t k = 0; k < num_steps; ++k) {
      CHECK_VALUE(0 <= end(k) && end(k) < num_tokens, "step_ends must lie in [0, ", num_tokens, "), got ", end(k),
                  " at index ", k);
      CHECK_VALUE(k == 0 || end(k - 1) < end(k), "step_ends must ascend, got ", end(k - 1), " then ", end(k),
                  " at index ", k);
    }
    int64_t k = 0;
    for (int64_t i = 0; i < cu.num_sequences(); ++i) {
      first_[i] = k;
      while (k < num_steps && end(k) < cu[i + 1]) ++k;
    }
    first_.back() = num_steps;
  }

  int64_t end(int64_t k) const {
    return wide_ ? static_cast<const int64_t*>(data_)[k] : static_cast<const int32_t*>(data_)[k];
  }
  // The steps of sequence i are first(i) to first(i + 1) - 1.
  int64_t first(int64_t i) const { return first_[i]; }
  int64_t count(int64_t i) const { return first_[i + 1] - first_[i]; }
  // The first row of step k of sequence i, and of the rows after its last step for k = first(i + 1).
  int64_t begin(int64_t i, int64_t k) const { return k == first_[i] ? cu_[i] : end(k - 1) + 1; }

 private:
  const void* data_;
  bool wide_;
  const CuSeqlens& cu_;
  std::vector<int64_t> first_;
};

}  // namespace qrm_fast
