// The rewards of one sequence's actions from their Q-RM scores, given shift and scale: normalise, re-score the last
// action, subtract the KL penalty, mask. Arithmetic is in double and rounded once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../dtypes.h"
#include "moments.h"
#include "policy_terms.h"

namespace qrm_fast {

// 1 / (sigma + eps) of a set with sigma at least min_std; 0 for a set without spread.
inline double inverse_spread(const Moments& set, double min_std, double eps) {
  const double sigma = std::max(std::sqrt(set.m2 / std::max(set.count, 1.0)), min_std);
  return sigma != 0 ? 1 / (sigma + eps) : 0;
}

template <typename T>
struct Penalty {
  const acc_t<T>* logprobs;  // nullptr: none
  const acc_t<T>* ref_logprobs;
  KlEstimator estimator;
  double coef;

  double operator()(int64_t t) const {
    if (logprobs == nullptr) return 0;
    const double d = static_cast<double>(logprobs[t]) - ref_logprobs[t];
    if (estimator == KlEstimator::kAbs) return coef * std::abs(d);
    if (estimator == KlEstimator::kK1) return coef * d;
    if (estimator == KlEstimator::kK2) return coef * (d * d / 2);
    return coef * (std::expm1(-d) + d);
  }
};

// Calls write(t, reward) for every unmasked row, in order, but for the last one of a sequence that is re-scored, which
// is written twice; write(t, 0) for the masked ones.
template <typename T, typename Write>
void sequence_rewards(const T* q, const bool* mask, int64_t bos, int64_t eos, double shift, double scale,
                      bool rescore_last, const Penalty<T>& penalty, Write&& write) {
  double sum = 0;
  int64_t count = 0, last = -1;
  for (int64_t t = bos; t < eos; ++t) {
    if (mask != nullptr && !mask[t]) {
      write(t, 0.0);
      continue;
    }
    const double y = (static_cast<double>(static_cast<acc_t<T>>(q[t])) - shift) * scale;
    sum += y;
    ++count;
    last = t;
    write(t, y - penalty(t));
  }
  if (rescore_last && count > 0) write(last, sum / count - penalty(last));
}

}  // namespace qrm_fast
