// V-trace over packed sequences: clipped ratios, the recurrence, targets and advantages in one reverse scan.
// Reads rewards, values and ratios once, writes targets and advantages once: 20 bytes per token in fp32. Clipped ratios
// and TD errors are never written. packed/scan.h has the order and its reasons.

#include "packed/scan.h"

namespace qrm_fast {
namespace {

// A_t = rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t A_{t+1}, with rho_t = min(rho_bar, ratio_t) and
// c_t = lam min(c_bar, ratio_t); the target of V_t is V_t + A_t.
struct VtraceRule {
  using Map = Affine<double>;
  static constexpr int kInputs = 3, kOutputs = 2, kNext = 1;
  static constexpr double kNoBootstrap = 0;
  static constexpr bool kSameFactor = false;

  double gamma, decay, rho_bar, c_bar;  // decay = gamma lam

  Carry end(double bootstrap) const { return {0, bootstrap}; }
  double next(double value) const { return value; }

  template <int Bytes>
  struct Vectors {
    using L = Lanes<Bytes>;
    using Vec = typename L::Vec;
    struct Maps {
      Vec a, b;
    };
    const double gamma, decay;
    const Vec rho_bar, c_bar;

    QRM_FAST_INLINE explicit Vectors(const VtraceRule& rule)
        : gamma(rule.gamma), decay(rule.decay), rho_bar(L::broadcast(rule.rho_bar)), c_bar(L::broadcast(rule.c_bar)) {}

    QRM_FAST_INLINE Vec rho(const Vec* in) const { return L::minimum(in[2], rho_bar); }
    // The product of a vector's eight factors is zero only if one of them is: see decay_product.
    QRM_FAST_INLINE Vec factor(const Vec* in) const {
      const Vec f = decay * L::minimum(in[2], c_bar);
      // max(f, 1e-38), but 0 for 0: f times a large number is at most 1 only where it must be raised.
      return -L::minimum(-f, -L::minimum(f * 1e300, L::broadcast(1e-38)));
    }
    template <int K>
    QRM_FAST_INLINE static void compose(Maps& m) {
      m.b += m.a * L::template later<K>(m.b, Vec{});
      m.a *= L::template later<K>(m.a, L::broadcast(1));
    }

    QRM_FAST_INLINE Vec next(const Vec* in) const { return in[1]; }
    QRM_FAST_INLINE Maps composed(const Vec* in, Vec after) const {
      Maps m = {factor(in), rho(in) * (in[0] + gamma * after - in[1])};
      compose<1>(m);
      if constexpr (L::kLanes > 2) compose<2>(m);
      if constexpr (L::kLanes > 4) compose<4>(m);
      return m;
    }
    QRM_FAST_INLINE Map map(const Maps& m, int64_t lane) const { return {m.a[lane], m.b[lane]}; }
    QRM_FAST_INLINE Vec apply(const Maps& m, double x) const { return m.b + m.a * x; }
    QRM_FAST_INLINE void results(const Vec* in, Vec after, Vec x, Vec later, Vec* out) const {
      out[0] = in[1] + x;
      out[1] = rho(in) * (in[0] + gamma * (after + later) - in[1]);
    }
  };
};

std::tuple<Tensor, Tensor> vtrace(const Tensor& rewards, const Tensor& values, const Tensor& ratios,
                                  const Tensor& cu_seqlens, double gamma, double lam, double rho_bar, double c_bar,
                                  const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const SameRule<VtraceRule> rules{{gamma, gamma * lam, rho_bar, c_bar}};
  const auto [targets, advantages] =
      scan_packed<2>({rewards, values, ratios}, cu_seqlens, bootstrap, mask, [&](auto) { return rules; });
  return {targets, advantages};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("vtrace", TORCH_BOX(&qrm_fast::vtrace)); }
