// The policy-gradient loss of one token and its derivative: the arithmetic that policy_loss and the fused heads share,
// on CPU and CUDA. Free of torch types.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define QRM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QRM_HOST_DEVICE inline
#endif

namespace qrm_fast {

enum class PolicyKind { kPpo, kReinforce, kCispo, kGspo };
enum class KlEstimator { kK1, kK2, kK3 };

template <typename T>
struct PolicyOptions {
  PolicyKind kind;
  T ratio_low;   // 1 - clip_low
  T ratio_high;  // 1 + clip_high
  T dual_clip;   // +infinity: no bound
  T kl_coef;
  KlEstimator kl_estimator;
};

template <typename T>
struct PolicyTerms {
  T loss;      // before the token weight and the entropy bonus
  T dlogprob;  // d loss / d logprob
  T ratio;     // of the loss: gspo's is its sequence's
  T approx_kl;
  T ref_kl;
  bool clipped_low;
  bool clipped_high;
};

// KL(policy, reference) from one sample, d = logprob - ref; expm1 keeps the digits of k3 where d is small.
template <typename T>
QRM_HOST_DEVICE T kl_estimate(T d, KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::kK1:
      return d;
    case KlEstimator::kK2:
      return T(0.5) * d * d;
    default:
      return std::expm1(-d) + d;
  }
}

template <typename T>
QRM_HOST_DEVICE T kl_derivative(T d, KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::kK1:
      return T(1);
    case KlEstimator::kK2:
      return d;
    default:
      return -std::expm1(-d);
  }
}

// `log_ratio`: of the ratio that the loss uses, logprob - old or, for gspo, its mean over the sequence. `ref` is null
// without a reference policy. Comparisons are written so that a NaN reaches both loss and derivative.
template <typename T>
QRM_HOST_DEVICE PolicyTerms<T> policy_terms(T logprob, T old, T log_ratio, const T* ref, T advantage,
                                            const PolicyOptions<T>& o) {
  PolicyTerms<T> out;
  out.ratio = std::exp(log_ratio);
  out.approx_kl = std::expm1(logprob - old) - (logprob - old);
  const bool below = out.ratio<o.ratio_low, above = out.ratio> o.ratio_high;
  out.clipped_low = below && advantage < T(0);
  out.clipped_high = above && advantage > T(0);
  if (o.kind == PolicyKind::kPpo || o.kind == PolicyKind::kGspo) {
    // max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0, at most -A dual_clip. Of gspo's ratio s exp(logp - sg
    // logp) value and derivative are s, as those of exp are one.
    const T surrogate = -advantage * out.ratio;
    const T clipped = -advantage * (below ? o.ratio_low : above ? o.ratio_high : out.ratio);
    out.loss = surrogate < clipped ? clipped : surrogate;
    out.dlogprob = surrogate < clipped ? T(0) : surrogate;
    if (advantage < T(0) && out.loss > -advantage * o.dual_clip) {
      out.loss = -advantage * o.dual_clip;
      out.dlogprob = T(0);
    }
  } else {
    // -scale A logp: the scale is 1, or cispo's min(r, 1 + high) without a gradient of its own
    const T scale = o.kind == PolicyKind::kCispo ? (above ? o.ratio_high : out.ratio) : T(1);
    out.dlogprob = -scale * advantage;
    out.loss = out.dlogprob * logprob;
  }
  out.ref_kl = T(0);
  if (ref != nullptr) {
    const T d = logprob - *ref;
    out.ref_kl = kl_estimate(d, o.kl_estimator);
    if (o.kl_coef != T(0)) {
      out.loss += o.kl_coef * out.ref_kl;
      out.dlogprob += o.kl_coef * kl_derivative(d, o.kl_estimator);
    }
  }
  return out;
}

}  // namespace qrm_fast
