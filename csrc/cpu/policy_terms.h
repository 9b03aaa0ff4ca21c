// The policy-gradient loss of tokens and its derivative: the arithmetic that policy_loss and the fused heads share. Of
// one token (V a number) or of one token per lane (V a vector of numbers).
#pragma once
#include <cmath>
#include <string>

#include "../tensors.h"
#include "simd/simd.h"

namespace qrm_fast {

enum class PolicyKind { kPpo, kReinforce, kCispo, kGspo, kSapo };
enum class KlEstimator { kAbs, kK1, kK2, kK3, kUnbiased };  // kAbs is of q_token_rewards alone, kUnbiased of the losses

inline constexpr double kSapoTemperatureBelow = 1.05;  // of A < 0; 1 of other rows

inline KlEstimator kl_estimator_of(const std::string& name) {
  if (name == "abs") return KlEstimator::kAbs;
  if (name == "k1") return KlEstimator::kK1;
  if (name == "k2") return KlEstimator::kK2;
  if (name == "unbiased") return KlEstimator::kUnbiased;
  STD_TORCH_CHECK(name == "k3", "the public function admits only known estimators");
  return KlEstimator::kK3;
}

template <typename V>
struct PolicyOptions {
  PolicyKind kind;
  V ratio_low;   // 1 - clip_low
  V ratio_high;  // 1 + clip_high
  V dual_clip;   // +infinity: no bound
  V kl_coef;
  bool has_kl;  // kl_coef is not 0
  KlEstimator kl_estimator;
};

template <typename V>
struct PolicyTerms {
  V loss;      // before the token weight and the entropy bonus
  V dlogprob;  // d loss / d logprob
  V ratio;     // of the loss: gspo's is its sequence's
  V approx_kl;
  V ref_kl;
  V clipped_low;  // 0 or 1, as the next one
  V clipped_high;
};

template <typename T>
struct ScalarMath {
  static T exp(T x) { return std::exp(x); }
  static T exp_bounded(T x) { return std::exp(x); }  // of |x| <= 20
  static T expm1(T x, T) { return std::expm1(x); }   // beside exp(x)
  // `then` where a < b, so not where one is NaN.
  static T where_less(T a, T b, T then, T otherwise) { return a < b ? then : otherwise; }
};

// `log_ratio`: of the ratio that the loss uses, logprob - old or, for gspo, its mean over the sequence. `ref` is null
// without a reference policy. Beyond +-20 a log-ratio counts as 20 in every exponential, and the ratio has no gradient
// there: an overflow would make 0 * infinity of an advantage of 0. Comparisons are written so that a NaN reaches both
// loss and derivative.
template <typename V, typename Math = ScalarMath<V>>
QRM_FAST_INLINE PolicyTerms<V> policy_terms(V logprob, V old, V log_ratio, const V* ref, V advantage,
                                            const PolicyOptions<V>& o) {
  const V zero{}, one = zero + 1, limit = zero + 20;
  const auto where_less = [](V a, V b, V then, V otherwise)
                              __attribute__((always_inline)) { return Math::where_less(a, b, then, otherwise); };
  const auto bounded = [&](V x) __attribute__((always_inline)) {
    return where_less(limit, x, limit, where_less(x, -limit, -limit, x));
  };
  PolicyTerms<V> out;
  const V used = bounded(log_ratio), own = bounded(logprob - old), beyond = log_ratio - used;
  const V own_ratio = Math::exp_bounded(own);
  out.ratio = Math::exp_bounded(used);
  out.approx_kl = Math::expm1(own, own_ratio) - own;
  out.clipped_low = where_less(out.ratio, o.ratio_low, where_less(advantage, zero, one, zero), zero);
  out.clipped_high = where_less(o.ratio_high, out.ratio, where_less(zero, advantage, one, zero), zero);
  if (o.kind == PolicyKind::kPpo || o.kind == PolicyKind::kGspo) {
    // max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0, at most -A dual_clip. Of gspo's ratio s exp(logp - sg
    // logp) value and derivative are s, as those of exp are one.
    const V surrogate = -advantage * out.ratio, bound = -advantage * o.dual_clip;
    const V below = where_less(o.ratio_high, out.ratio, o.ratio_high, out.ratio);
    const V clipped = -advantage * where_less(out.ratio, o.ratio_low, o.ratio_low, below);
    const V loss = where_less(surrogate, clipped, clipped, surrogate);
    const V moving = where_less(zero, beyond * beyond, zero, surrogate);
    const V slope = where_less(surrogate, clipped, zero, moving);
    out.loss = where_less(advantage, zero, where_less(bound, loss, bound, loss), loss);
    out.dlogprob = where_less(advantage, zero, where_less(bound, loss, zero, slope), slope);
  } else if (o.kind == PolicyKind::kSapo) {
    // -A (4 / tau) sigmoid(tau (r - 1)), with the slope -4 A sigmoid(x) sigmoid(-x) r
    const V tau = where_less(advantage, zero, zero + kSapoTemperatureBelow, one);
    const V e = Math::exp(-tau * (out.ratio - 1)), gate = one / (one + e);
    const V slope = -4 * advantage * gate * (e * gate) * out.ratio;
    out.loss = -4 * advantage * gate / tau;
    out.dlogprob = where_less(zero, beyond * beyond, zero, slope);
  } else {
    // -scale A logp: the scale is 1, or cispo's clip(r, 1 - low, 1 + high) without a gradient of its own
    const V below = where_less(o.ratio_high, out.ratio, o.ratio_high, out.ratio);
    const V capped = where_less(out.ratio, o.ratio_low, o.ratio_low, below);
    out.dlogprob = -(o.kind == PolicyKind::kCispo ? capped : one) * advantage;
    out.loss = out.dlogprob * logprob;
  }
  out.ref_kl = zero;
  if (ref != nullptr) {
    // KL(policy, reference) from one sample; expm1 keeps the digits of k3 where d is small
    const V d = logprob - *ref;
    V slope;
    if (o.kl_estimator == KlEstimator::kK1) {
      out.ref_kl = d, slope = one;
    } else if (o.kl_estimator == KlEstimator::kK2) {
      out.ref_kl = d * d / 2, slope = d;
    } else {
      const V x = where_less(limit, -d, limit, -d);
      slope = -Math::expm1(x, Math::exp(x));
      out.ref_kl = d - slope;
      if (o.kl_estimator == KlEstimator::kUnbiased) out.ref_kl *= own_ratio, slope = own_ratio * d;
    }
    if (o.has_kl) {
      out.loss += o.kl_coef * out.ref_kl;
      out.dlogprob += o.kl_coef * slope;
    }
  }
  return out;
}

}  // namespace qrm_fast
