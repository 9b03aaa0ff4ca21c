// Which sequences belong to a group with more than one finite reward. A few dozen bytes per sequence: serial.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../dtypes.h"
#include "packed/groups.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

Tensor informative_groups(const Tensor& rewards, const Tensor& group_ids) {
  const Groups groups(group_ids);
  Tensor mask = torch::stable::new_empty(rewards, {groups.size()}, ScalarType::Bool);
  bool* m = static_cast<bool*>(mask.mutable_data_ptr());
  dispatch_floating(rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* r = static_cast<const T*>(rewards.const_data_ptr());
    const auto reward = [&](int64_t i) { return static_cast<acc_t<T>>(r[i]); };
    for (int64_t id = 0; id < groups.size(); ++id) {
      const Groups::Members members = groups.members(id);
      int64_t first = -1;
      bool differ = false;
      for (const int64_t i : members) {
        if (!std::isfinite(reward(i))) continue;
        if (first < 0) first = i;
        differ = differ || reward(i) != reward(first);
      }
      for (const int64_t i : members) m[i] = differ && std::isfinite(reward(i));
    }
  });
  return mask;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("informative_groups", TORCH_BOX(&qrm_fast::informative_groups)); }
