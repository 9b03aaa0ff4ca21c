// What policy_loss and linear_policy_loss share beside the terms of one token: options from the schema's strings, and
// the sums behind loss and metrics.
#pragma once
#include <algorithm>
#include <string>

#include "policy_terms.h"

namespace qrm_fast {

inline constexpr int64_t kPolicyMetrics = 7;

// Loss and the fields of PolicyMetrics in qrm_fast/ops/policy_loss.py; the last is a maximum.
struct PolicySums {
  double loss = 0;
  double metrics[kPolicyMetrics] = {};

  template <typename T>
  void add_token(const PolicyTerms<T>& x, T entropy, T entropy_coef, T weight) {
    const T bonus = entropy_coef != 0 ? entropy_coef * entropy : T(0);
    add({x.loss - bonus,
         {double(x.clipped_low), double(x.clipped_high), x.approx_kl, x.ref_kl, x.ratio, entropy, x.ratio}},
        weight);
  }

  void add(const PolicySums& x, double weight) {
    loss += weight * x.loss;
    for (int64_t i = 0; i < kPolicyMetrics - 1; ++i) metrics[i] += weight * x.metrics[i];
    raise(x.metrics[kPolicyMetrics - 1]);
  }

  void raise(double ratio) {
    double& top = metrics[kPolicyMetrics - 1];
    if (ratio > top || ratio != ratio) top = ratio;  // a NaN stays
  }
};

// gspo's log s: the mean of logp - old over those rows of a sequence that count, summed in double in their order.
struct MeanLogRatio {
  double sum = 0;
  int64_t count = 0;

  void add(double log_ratio) {
    sum += log_ratio;
    ++count;
  }
  double value() const { return count > 0 ? sum / count : 0; }
};

template <typename S>
PolicyOptions<S> policy_options(const std::string& kind, double clip_low, double clip_high, double dual_clip,
                                double kl_coef, const std::string& kl_estimator) {
  return {
      kind == "ppo"     ? PolicyKind::kPpo
      : kind == "cispo" ? PolicyKind::kCispo
      : kind == "gspo"  ? PolicyKind::kGspo
      : kind == "sapo"  ? PolicyKind::kSapo
                        : PolicyKind::kReinforce,
      static_cast<S>(1 - clip_low),
      static_cast<S>(1 + clip_high),
      static_cast<S>(dual_clip),
      static_cast<S>(kl_coef),
      kl_coef != 0,
      kl_estimator_of(kl_estimator),
  };
}

}  // namespace qrm_fast
