// Advantages of sequences over their group, in double, each group summed in the order of its sequences about its first
// reward, so that a group of equal rewards gives exactly 0. Work is a few dozen bytes per sequence: serial.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../dtypes.h"
#include "packed/groups.h"

namespace qrm_fast {
namespace {

// What the kinds need of the finite rewards of a group.
struct GroupSums {
  int64_t n = 0;
  double mean = 0;
  double std = 0;             // with n - 1 in the denominator
  double length_mean = 0;     // sum L R / sum L, the mean where no sequence has tokens
  int64_t best = -1;          // the first of the highest
  double second = -HUGE_VAL;  // the highest of the others
};

template <typename T, typename Length>
GroupSums group_sums(const T* rewards, const Groups::Members& members, Length&& length) {
  const auto reward = [&](int64_t i) { return static_cast<double>(static_cast<acc_t<T>>(rewards[i])); };
  GroupSums g;
  double origin = 0, sum = 0, m2 = 0, weights = 0, weighted = 0;
  for (const int64_t i : members) {
    if (!std::isfinite(reward(i))) continue;
    if (g.n == 0) origin = reward(i);
    sum += reward(i) - origin;
    weights += length(i);
    weighted += length(i) * (reward(i) - origin);
    ++g.n;
    if (g.best < 0 || reward(i) > reward(g.best)) {
      if (g.best >= 0) g.second = reward(g.best);
      g.best = i;
    } else {
      g.second = std::max(g.second, reward(i));
    }
  }
  g.mean = origin + sum / g.n;
  g.length_mean = weights > 0 ? origin + weighted / weights : g.mean;
  for (const int64_t i : members) {
    if (std::isfinite(reward(i))) m2 += (reward(i) - g.mean) * (reward(i) - g.mean);
  }
  g.std = std::sqrt(m2 / (g.n - 1));
  return g;
}

Tensor group_advantages(const Tensor& rewards, const Tensor& group_ids, const std::optional<Tensor>& lengths,
                        const std::optional<Tensor>& baseline, std::string kind, double eps) {
  const Groups groups(group_ids);
  const bool rloo = kind == "rloo", grpo = kind == "grpo", opo = kind == "opo", remax = kind == "remax";
  const bool pass_at_k = kind == "pass_at_k", mean = kind == "dr_grpo" || kind == "reinforce_pp_baseline";
  STD_TORCH_CHECK(rloo || grpo || opo || remax || pass_at_k || mean, "the public function admits only known kinds");
  const int64_t* wide = nullptr;
  const int32_t* narrow = nullptr;
  if (opo) {
    if (lengths->scalar_type() == ScalarType::Long) wide = data<int64_t>(*lengths);
    if (wide == nullptr) narrow = data<int32_t>(*lengths);
  }
  const auto length = [&](int64_t i) { return wide ? wide[i] : narrow ? narrow[i] : int64_t{0}; };
  for (int64_t i = 0; i < groups.size(); ++i) {
    CHECK_VALUE(length(i) >= 0, "lengths must be >= 0, got ", length(i), " at index ", i);
  }
  Tensor advantages = torch::stable::new_empty(rewards, {groups.size()}, acc_dtype(rewards.scalar_type()));
  dispatch_floating(rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* r = data<T>(rewards);
    const T* greedy = data_or_null<T>(baseline);
    acc_t<T>* a = mutable_data<acc_t<T>>(advantages);
    const auto advantage = [&](int64_t i, const GroupSums& g) -> double {
      const double reward = static_cast<acc_t<T>>(r[i]);
      const double deviation = reward - g.mean;
      if (remax) return reward - static_cast<acc_t<T>>(greedy[i]);
      if (opo) return reward - g.length_mean;
      if (pass_at_k) return i == g.best && g.n > 1 && reward != g.second ? (reward - g.second) / (g.std + eps) : 0;
      if (mean) return deviation;
      if (g.n == 1) return reward;
      return rloo ? deviation * g.n / (g.n - 1) : deviation == 0 ? 0 : deviation / (g.std + eps);
    };
    for (int64_t id = 0; id < groups.size(); ++id) {
      const Groups::Members members = groups.members(id);
      const GroupSums g = group_sums(r, members, length);
      for (const int64_t i : members) {
        const bool finite = std::isfinite(static_cast<acc_t<T>>(r[i]));
        const double value = finite ? advantage(i, g) : std::numeric_limits<double>::quiet_NaN();
        a[i] = std::isfinite(value) ? value : std::numeric_limits<double>::quiet_NaN();
      }
    }
  });
  return advantages;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("group_advantages", TORCH_BOX(&qrm_fast::group_advantages)); }
