// Steps of packed sequences: the rows where one ends, int32 or int64 [K], read as int64 without a copy. A step begins
// after the previous one of its sequence; rows after a sequence's last step end belong to none.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../../check.h"
#include "../simd/instruction_set.h"
#include "cu_seqlens.h"

namespace qrm_fast {

// x[begin - 1] < x[begin] < ... < x[end - 1]
template <typename I>
QRM_FAST_CLONES static bool ascends(const I* x, int64_t begin, int64_t end) {
  I stalls = 0;
  for (int64_t k = begin; k < end; ++k) stalls |= x[k - 1] >= x[k] ? 1 : 0;
  return stalls == 0;
}

class Steps {
 public:
  // Of ends that `check` has seen.
  Steps(const Tensor& step_ends, const CuSeqlens& cu)
      : data_(step_ends.const_data_ptr()),
        wide_(step_ends.scalar_type() == ScalarType::Long),
        cu_(cu),
        first_(cu.num_sequences() + 1) {
    wide_ ? find_firsts<int64_t>(step_ends.size(0)) : find_firsts<int32_t>(step_ends.size(0));
  }

  // Throws ValueError unless the ends ascend strictly within [0, num_tokens).
  static void check(const Tensor& step_ends, int64_t num_tokens) {
    const bool wide = step_ends.scalar_type() == ScalarType::Long;
    wide ? check<int64_t>(step_ends, num_tokens) : check<int32_t>(step_ends, num_tokens);
  }

  int64_t end(int64_t k) const {
    return wide_ ? static_cast<const int64_t*>(data_)[k] : static_cast<const int32_t*>(data_)[k];
  }
  // The ends as they lie, I being int64_t where wide(), else int32_t.
  bool wide() const { return wide_; }
  template <typename I>
  const I* ends() const {
    return static_cast<const I*>(data_);
  }
  // The steps of sequence i are first(i) to first(i + 1) - 1.
  int64_t first(int64_t i) const { return first_[i]; }
  int64_t count(int64_t i) const { return first_[i + 1] - first_[i]; }
  // The most steps of any sequence.
  int64_t longest() const {
    int64_t most = 0;
    for (size_t i = 1; i < first_.size(); ++i) most = std::max(most, first_[i] - first_[i - 1]);
    return most;
  }
  // The first row of step k of sequence i, and of the rows after its last step for k = first(i + 1).
  int64_t begin(int64_t i, int64_t k) const { return k == first_[i] ? cu_[i] : end(k - 1) + 1; }

 private:
  // Doubling steps from the sequence's first, then halving: few probes, all close by.
  template <typename I>
  void find_firsts(int64_t num_steps) {
    const I* ends = static_cast<const I*>(data_);
    int64_t from = 0;
    for (int64_t i = 0; i < cu_.num_sequences(); ++i) {
      first_[i] = from;
      const int64_t eos = cu_[i + 1];
      int64_t reach = 1;
      while (from + reach <= num_steps && ends[from + reach - 1] < eos) reach *= 2;
      // the first `from` ends lie before eos, and at most `reach` - 1 more do
      for (reach = reach / 2; reach > 0; reach /= 2) {
        if (from + reach <= num_steps && ends[from + reach - 1] < eos) from += reach;
      }
    }
    first_.back() = num_steps;
  }

  template <typename I>
  static void check(const Tensor& step_ends, int64_t num_tokens) {
    const I* ends = data<I>(step_ends);
    const int64_t num_steps = step_ends.size(0);
    std::atomic<bool> ascending = num_steps == 0 || (0 <= ends[0] && ends[num_steps - 1] < num_tokens);
    torch::stable::parallel_for(1, num_steps, 4096, [&](int64_t begin, int64_t end) {
      if (!ascends(ends, begin, end)) ascending = false;
    });
    for (int64_t k = 0; !ascending && k < num_steps; ++k) {
      CHECK_VALUE(0 <= ends[k] && ends[k] < num_tokens, "step_ends must lie in [0, ", num_tokens, "), got ", ends[k],
                  " at index ", k);
      CHECK_VALUE(k == 0 || ends[k - 1] < ends[k], "step_ends must ascend, got ", ends[k - 1], " then ", ends[k],
                  " at index ", k);
    }
  }

  const void* data_;
  bool wide_;
  const CuSeqlens& cu_;
  std::vector<int64_t> first_;
};

}  // namespace qrm_fast
