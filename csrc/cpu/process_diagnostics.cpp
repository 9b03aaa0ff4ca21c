// Statistics of process rewards: reads the steps once and, for the shares of |A|, 4 bytes per row in fp32. In double;
// sequences run in parallel and are summed in order.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../dtypes.h"
#include "packed/cu_seqlens.h"
#include "packed/steps.h"
#include "parallel.h"

namespace qrm_fast {
namespace {

struct Diagnosis {
  double outcome = 0;
  double worst_position = 0;
  double effective_steps = 0;
};

// outcome = sum of w r; exp(entropy) = Z exp(sum of w x), with x = (r - minimum) / temperature and w = exp(-x) / Z.
template <typename T>
Diagnosis diagnose(const T* rewards, int64_t n, double temperature) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  if (n == 0) return {};
  const auto reward = [&](int64_t k) { return static_cast<double>(static_cast<acc_t<T>>(rewards[k])); };
  int64_t lowest = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (!std::isfinite(reward(k))) return {kNaN, kNaN, kNaN};
    if (reward(k) < reward(lowest)) lowest = k;
  }
  double total = 0, weighted = 0, spread = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double excess = reward(k) - reward(lowest);
    const double x = excess == 0 ? 0 : excess / temperature;
    const double weight = std::exp(-x);
    total += weight;
    weighted += weight * reward(k);
    if (weight != 0) spread += weight * x;
  }
  return {weighted / total, static_cast<double>(lowest + 1) / n, total * std::exp(spread / total)};
}

std::tuple<Tensor, Tensor> process_diagnostics(const Tensor& step_rewards, const Tensor& step_ends,
                                               const Tensor& cu_seqlens, double temperature, int64_t min_tokens,
                                               const std::optional<Tensor>& advantages) {
  const int64_t num_sequences = cu_seqlens.size(0) - 1;
  const bool wide_index = cu_seqlens.scalar_type() == ScalarType::Long;
  const int64_t last = wide_index ? data<int64_t>(cu_seqlens)[num_sequences] : data<int32_t>(cu_seqlens)[num_sequences];
  const int64_t num_tokens = advantages.has_value() ? advantages->size(0) : last;
  const CuSeqlens cu(cu_seqlens, num_tokens);
  Steps::check(step_ends, num_tokens);
  const Steps steps(step_ends, cu);
  const auto dtype = acc_dtype(step_rewards.scalar_type());
  Tensor per_sequence = torch::stable::new_empty(step_rewards, {3, num_sequences}, dtype);
  Tensor shares = torch::stable::new_empty(step_rewards, {4}, dtype);
  dispatch_floating(step_rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* r = data<T>(step_rewards);
    const A* a = data_or_null<A>(advantages);
    A* out = mutable_data<A>(per_sequence);
    std::vector<double> mass(num_sequences);
    parallel(num_sequences, 16, [&](int64_t i) {
      const Diagnosis d = diagnose(r + steps.first(i), steps.count(i), temperature);
      out[i] = d.outcome;
      out[num_sequences + i] = d.worst_position;
      out[2 * num_sequences + i] = d.effective_steps;
      for (int64_t t = cu[i]; a != nullptr && t < cu[i + 1]; ++t) {
        if (std::isfinite(a[t])) mass[i] += std::abs(a[t]);
      }
    });
    double few[2] = {}, few_mass[2] = {}, whole = 0;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const bool counts[2] = {steps.count(i) <= 1, cu[i + 1] - cu[i] < min_tokens};
      whole += mass[i];
      for (int64_t j = 0; j < 2; ++j) {
        few[j] += counts[j];
        few_mass[j] += counts[j] ? mass[i] : 0;
      }
    }
    A* share = mutable_data<A>(shares);
    for (int64_t j = 0; j < 2; ++j) {
      share[j] = few[j] / std::max<int64_t>(num_sequences, 1);
      share[2 + j] = whole > 0 ? few_mass[j] / whole : 0;
    }
  });
  return {per_sequence, shares};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) {
  m.impl("process_diagnostics", TORCH_BOX(&qrm_fast::process_diagnostics));
}
