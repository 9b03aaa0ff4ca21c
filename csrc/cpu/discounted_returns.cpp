// Discounted returns over packed sequences, one reverse scan.
// Reads rewards once and writes returns once: 8 bytes per token in fp32; nothing else of length T exists. packed/scan.h
// has the order and its reasons.

#include "packed/scan.h"

namespace qrm_fast {
namespace {

// R_t = r_t + gamma R_{t+1}
struct ReturnRule {
  using Map = Affine<double>;
  static constexpr int kInputs = 1, kOutputs = 1, kNext = -1;
  static constexpr double kNoBootstrap = 0;
  static constexpr bool kSameFactor = true;

  DecayPowers decay;

  Carry end(double bootstrap) const { return {bootstrap, 0}; }

  template <int Bytes>
  struct Vectors : SameFactor<Bytes> {
    using Vec = typename Lanes<Bytes>::Vec;

    QRM_FAST_INLINE explicit Vectors(const ReturnRule& rule) : SameFactor<Bytes>{rule.decay} {}
    QRM_FAST_INLINE Vec next(const Vec*) const { return Vec{}; }
    QRM_FAST_INLINE Vec terms(const Vec* in, Vec) const { return in[0]; }
    QRM_FAST_INLINE Vec composed(const Vec* in, Vec) const { return this->compose(in[0]); }
    QRM_FAST_INLINE void results(const Vec*, Vec, Vec x, Vec, Vec* out) const { out[0] = x; }
  };
};

Tensor discounted_returns(const Tensor& rewards, const Tensor& cu_seqlens, double gamma,
                          const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const SameRule<ReturnRule> rules{{DecayPowers(gamma)}};
  return scan_packed<1>({rewards}, cu_seqlens, bootstrap, mask, [&](auto) { return rules; })[0];
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("discounted_returns", TORCH_BOX(&qrm_fast::discounted_returns)); }
