// The return at every step by the min-form and its relatives, over the steps alone: 8 bytes read and 8 written per
// step, some 40 times fewer than tokens; step_rows spreads them over the rows. One pass forward and one in reverse per
// sequence, in double, rounded by the caller; sequences run in parallel, so a step's bits depend on its sequence only.
#include "min_form_returns.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../dtypes.h"
#include "packed/cu_seqlens.h"
#include "packed/steps.h"

namespace qrm_fast {
namespace {

// exp(-excess / temperature) of an excess >= 0 over the minimum: 1 at the minimum for temperature 0, 1 for infinity.
inline double weight(double excess, double temperature) { return excess == 0 ? 1.0 : std::exp(-excess / temperature); }

// Copies the rewards in double, whole vectors of them; returns the lowest, or NaN where one is not finite. n > 0.
template <typename T>
QRM_FAST_CLONES double take_rewards(const T* rewards, int64_t n, double* returns) {
  for (int64_t k = 0; k < n; ++k) returns[k] = static_cast<acc_t<T>>(rewards[k]);
  for (int64_t k = n; k < whole_vectors(n); ++k) returns[k] = returns[0];
  Simd8::Vec low = Simd8::load(returns), zeros = low - low;
  for (int64_t k = Simd8::kLanes; k < n; k += Simd8::kLanes) {
    const Simd8::Vec r = Simd8::load(returns + k);
    low = r < low ? r : low;
    zeros += r - r;
  }
  if (Simd8::sum(zeros) != 0) return std::numeric_limits<double>::quiet_NaN();
  return Simd8::reduce(low, [](double a, double b) { return std::min(a, b); });
}

// G_t = sum over j >= t of w_j r_j, w = softmax(-r / temperature) over all steps; `returns` holds r at first.
QRM_FAST_CLONES void soft_returns(int64_t n, double minimum, double temperature, double* returns) {
  const double steepness = 1 / temperature;
  Simd8::Vec totals = {};
  for (int64_t k = 0; k < n; k += Simd8::kLanes) {
    const Simd8::Vec r = Simd8::load(returns + k), excess = r - minimum;
    Simd8::Vec w = excess == 0.0 ? Simd8::broadcast(1.0) : Simd8::exp(excess * -steepness);
    if (k + Simd8::kLanes > n) w = Simd8::keep_first(w, n - k);
    Simd8::store(returns + k, w * r);
    totals += w;
  }
  const double total = Simd8::sum(totals);
  const Simd8::Vec zero = {};
  double later = 0;
  for (int64_t k = whole_vectors(n) - Simd8::kLanes; k >= 0; k -= Simd8::kLanes) {
    Simd8::Vec sums = Simd8::load(returns + k);
    sums += __builtin_shufflevector(sums, zero, 1, 2, 3, 4, 5, 6, 7, 8);
    sums += __builtin_shufflevector(sums, zero, 2, 3, 4, 5, 6, 7, 8, 9);
    sums += __builtin_shufflevector(sums, zero, 4, 5, 6, 7, 8, 9, 10, 11);
    sums += later;
    later = sums[0];
    Simd8::store(returns + k, sums / total);
  }
}

// G_t = sum over j >= t of w_j r_j, w = softmax(-r / temperature) over j >= t: minimum + excess / total, both relative
// to the running minimum, so that temperature 0 gives the minimum itself.
template <typename T>
void causal_soft_returns(const T* rewards, int64_t n, double temperature, double* returns) {
  double minimum = 0, total = 0, excess = 0;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double reward = static_cast<acc_t<T>>(rewards[k]);
    if (total == 0) minimum = reward;
    if (reward < minimum) {
      const double gap = minimum - reward, factor = weight(gap, temperature);
      excess = factor * (excess + total * gap);
      total *= factor;
      minimum = reward;
    }
    const double w = weight(reward - minimum, temperature);
    total += w;
    excess += w * (reward - minimum);
    returns[k] = minimum + excess / total;
  }
}

template <typename T>
void sum_returns(const T* rewards, int64_t n, double* returns) {
  double sum = 0;
  for (int64_t k = n - 1; k >= 0; --k) returns[k] = sum += static_cast<acc_t<T>>(rewards[k]);
}

std::tuple<Tensor, Tensor, Tensor> min_form_returns(const Tensor& step_rewards, const Tensor& step_ends,
                                                    const Tensor& cu_seqlens, int64_t num_tokens, std::string form,
                                                    double temperature) {
  const CuSeqlens cu(cu_seqlens, num_tokens);
  Steps::check(step_ends, num_tokens);
  const Steps steps(step_ends, cu);
  const Form known = form_of(form);
  const auto dtype = acc_dtype(step_rewards.scalar_type());
  Tensor returns = torch::stable::new_empty(step_rewards, {step_rewards.size(0)}, ScalarType::Double);
  Tensor outcome = torch::stable::new_empty(step_rewards, {cu.num_sequences()}, dtype);
  Tensor worst = torch::stable::new_empty(step_rewards, {cu.num_sequences()}, ScalarType::Long);
  double* g = mutable_data<double>(returns);
  int64_t* w = mutable_data<int64_t>(worst);
  dispatch_floating(step_rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* r = data<T>(step_rewards);
    acc_t<T>* o = mutable_data<acc_t<T>>(outcome);
    torch::stable::parallel_for(0, cu.num_sequences(), 16, [&](int64_t begin, int64_t end) {
      std::vector<double> of_sequence(whole_vectors(steps.longest()));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = steps.first(i), n = steps.count(i);
        w[i] = -1;
        o[i] = 0;
        if (n == 0) continue;
        const double lowest = sequence_returns(r + first, n, known, temperature, of_sequence.data());
        const auto is_lowest = [&](T x) { return static_cast<double>(static_cast<acc_t<T>>(x)) == lowest; };
        if (lowest == lowest) w[i] = std::find_if(r + first, r + first + n, is_lowest) - r;
        o[i] = of_sequence[0];
        std::copy_n(of_sequence.begin(), n, g + first);
      }
    });
  });
  return {returns, outcome, worst};
}

}  // namespace

Form form_of(const std::string& name) {
  if (name == "soft") return Form::kSoft;
  if (name == "causal_soft") return Form::kCausalSoft;
  STD_TORCH_CHECK(name == "sum", "the public functions admit only known forms");
  return Form::kSum;
}

template <typename T>
double sequence_returns(const T* rewards, int64_t n, Form form, double temperature, double* returns) {
  const double minimum = take_rewards(rewards, n, returns);
  if (minimum != minimum) {
    std::fill_n(returns, n, minimum);
  } else if (form == Form::kSoft) {
    soft_returns(n, minimum, temperature, returns);
  } else if (form == Form::kCausalSoft) {
    causal_soft_returns(rewards, n, temperature, returns);
  } else {
    sum_returns(rewards, n, returns);
  }
  return minimum;
}

template double sequence_returns(const double*, int64_t, Form, double, double*);
template double sequence_returns(const float*, int64_t, Form, double, double*);
template double sequence_returns(const torch::headeronly::BFloat16*, int64_t, Form, double, double*);
template double sequence_returns(const torch::headeronly::Half*, int64_t, Form, double, double*);

}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("min_form_returns", TORCH_BOX(&qrm_fast::min_form_returns)); }
