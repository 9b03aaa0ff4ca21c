// Groups of sequences: int32 or int64 ids [S] in [0, S), any order and size; listed group by group, each in the order
// of its sequences, so that sums over a group run in a fixed order.
#pragma once
#include <cstdint>
#include <vector>

#include "../../check.h"
#include "../../tensors.h"

namespace qrm_fast {

class Groups {
 public:
  // The sequences of one group.
  struct Members {
    const int64_t* first;
    const int64_t* last;
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return last; }
    int64_t size() const { return last - first; }
    int64_t operator[](int64_t k) const { return first[k]; }
  };

  // Throws ValueError unless every id is in [0, S).
  explicit Groups(const Tensor& group_ids) : bounds_(group_ids.size(0) + 1), members_(group_ids.size(0)) {
    const bool wide = group_ids.scalar_type() == ScalarType::Long;
    const void* data = group_ids.const_data_ptr();
    const int64_t num_sequences = size();
    const auto id = [&](int64_t i) {
      return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    };
    for (int64_t i = 0; i < num_sequences; ++i) {
      CHECK_VALUE(0 <= id(i) && id(i) < num_sequences, "group_ids must lie in [0, ", num_sequences, "), got ", id(i),
                  " at index ", i);
      ++bounds_[id(i) + 1];
    }
    for (int64_t g = 0; g < num_sequences; ++g) bounds_[g + 1] += bounds_[g];
    std::vector<int64_t> next(bounds_);
    for (int64_t i = 0; i < num_sequences; ++i) members_[next[id(i)]++] = i;
  }

  int64_t size() const { return static_cast<int64_t>(members_.size()); }
  Members members(int64_t g) const { return {members_.data() + bounds_[g], members_.data() + bounds_[g + 1]}; }

 private:
  std::vector<int64_t> bounds_;
  std::vector<int64_t> members_;
};

}  // namespace qrm_fast
