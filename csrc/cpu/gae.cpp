// Generalised advantage estimation over packed sequences: TD errors, the recurrence and the returns in one reverse
// scan. Reads rewards and values once, writes advantages and returns once: 16 bytes and some 15 FLOP per token in fp32,
// so it is bound by memory. TD errors are never written. packed/scan.h has the order and its reasons.

#include "packed/scan.h"

namespace qrm_fast {
namespace {

// A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t
struct GaeRule {
  using Map = Affine<double>;
  static constexpr int kInputs = 2, kOutputs = 2, kNext = 1;
  static constexpr double kNoBootstrap = 0;
  static constexpr bool kSameFactor = true;

  double gamma;
  DecayPowers decay;

  Carry end(double bootstrap) const { return {0, bootstrap}; }
  double next(double value) const { return value; }

  template <int Bytes>
  struct Vectors : SameFactor<Bytes> {
    using Vec = typename Lanes<Bytes>::Vec;
    const double gamma;

    QRM_FAST_INLINE explicit Vectors(const GaeRule& rule) : SameFactor<Bytes>{rule.decay}, gamma(rule.gamma) {}
    QRM_FAST_INLINE Vec next(const Vec* in) const { return in[1]; }
    QRM_FAST_INLINE Vec terms(const Vec* in, Vec after) const { return in[0] + gamma * after - in[1]; }
    QRM_FAST_INLINE Vec composed(const Vec* in, Vec after) const { return this->compose(terms(in, after)); }
    QRM_FAST_INLINE void results(const Vec* in, Vec, Vec x, Vec, Vec* out) const {
      out[0] = x;
      out[1] = x + in[1];
    }
  };
};

template <typename S>
struct GaeRules {
  using Rule = GaeRule;

  double gamma;
  const S* lam_per_sequence;
  Rule shared;

  const Rule& operator()(int64_t s, Rule& own) const {
    if (lam_per_sequence == nullptr) return shared;
    return own = {gamma, DecayPowers(gamma * lam_per_sequence[s])};
  }
};

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double gamma,
                               double lam, const std::optional<Tensor>& lam_per_sequence,
                               const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const auto [advantages, returns] = scan_packed<2>({rewards, values}, cu_seqlens, bootstrap, mask, [&](auto zero) {
    using S = decltype(zero);
    return GaeRules<S>{gamma, data_or_null<S>(lam_per_sequence), {gamma, DecayPowers(gamma * lam)}};
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("gae", TORCH_BOX(&qrm_fast::gae)); }
