// Advantages of sequences over their group, in double, each group summed in the order of its sequences about its first
// reward, so that a group of equal rewards gives exactly 0. Work is a few dozen bytes per sequence: serial.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <string>

#include "dtypes.h"
#include "groups.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

template <typename T>
void group_advantages_of(const T* rewards, const Groups::Members& members, bool grpo, double eps,
                         acc_t<T>* advantages) {
  const auto reward = [&](int64_t i) { return static_cast<double>(static_cast<acc_t<T>>(rewards[i])); };
  int64_t n = 0;
  double origin = 0, sum = 0, m2 = 0;
  for (const int64_t i : members) {
    if (!std::isfinite(reward(i))) continue;
    if (n == 0) origin = reward(i);
    sum += reward(i) - origin;
    ++n;
  }
  const double mean = origin + sum / n;
  for (const int64_t i : members) {
    if (std::isfinite(reward(i))) m2 += (reward(i) - mean) * (reward(i) - mean);
  }
  for (const int64_t i : members) {
    const double deviation = reward(i) - mean;
    if (!std::isfinite(reward(i))) {
      advantages[i] = std::numeric_limits<acc_t<T>>::quiet_NaN();
    } else if (n == 1) {
      advantages[i] = reward(i);
    } else if (grpo) {
      advantages[i] = deviation == 0 ? 0 : deviation / (std::sqrt(m2 / (n - 1)) + eps);
    } else {
      advantages[i] = deviation * n / (n - 1);
    }
  }
}

Tensor group_advantages(const Tensor& rewards, const Tensor& group_ids, std::string kind, double eps) {
  const Groups groups(group_ids);
  const bool grpo = kind == "grpo";
  STD_TORCH_CHECK(grpo || kind == "rloo", "the public function admits only known kinds");
  Tensor advantages = torch::stable::new_empty(rewards, {groups.size()}, acc_dtype(rewards.scalar_type()));
  dispatch_floating(rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* r = static_cast<const T*>(rewards.const_data_ptr());
    acc_t<T>* a = static_cast<acc_t<T>*>(advantages.mutable_data_ptr());
    for (int64_t g = 0; g < groups.size(); ++g) group_advantages_of(r, groups.members(g), grpo, eps, a);
  });
  return advantages;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("group_advantages", TORCH_BOX(&qrm_fast::group_advantages)); }
