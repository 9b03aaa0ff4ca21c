// Discounted returns over packed sequences, one reverse scan.
// Reads rewards once and writes returns once: 8 bytes per token in fp32.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "memory.h"
#include "packed/scan.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

// R_t = r_t + gamma R_{t+1}
struct ReturnRule {
  using Map = Affine<double>;
  static constexpr int kInputs = 1, kOutputs = 1, kNext = -1;
  static constexpr double kNoBootstrap = 0;
  static constexpr bool kSameFactor = true;

  DecayPowers decay;

  Handed end(double bootstrap) const { return {bootstrap, 0}; }

  template <int Bytes>
  struct Vectors {
    using L = Lanes<Bytes>;
    using Vec = typename L::Vec;
    const DecayPowers& decay;

    QRM_FAST_INLINE explicit Vectors(const ReturnRule& rule) : decay(rule.decay) {}
    QRM_FAST_INLINE Vec next(const Vec*) const { return Vec{}; }
    QRM_FAST_INLINE Vec terms(const Vec* in, Vec) const { return in[0]; }
    QRM_FAST_INLINE Vec composed(const Vec* in, Vec) const { return L::composed(in[0], decay); }
    QRM_FAST_INLINE Map map(Vec b, int64_t lane) const { return {L::powers(decay)[lane], b[lane]}; }
    QRM_FAST_INLINE Vec apply(Vec b, double x) const { return b + L::powers(decay) * x; }
    QRM_FAST_INLINE void results(const Vec*, Vec, Vec x, Vec, Vec* out) const { out[0] = x; }
  };
};

Tensor discounted_returns(const Tensor& rewards, const Tensor& cu_seqlens, double gamma,
                          const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const CuSeqlens cu(cu_seqlens, rewards.size(0));
  Tensor returns = fresh_rows(rewards, rewards.size(0));
  dispatch_floating(rewards.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = acc_t<T>;
    PackedScan<SameRule<ReturnRule>, T>(cu, rewards.size(0), {static_cast<const T*>(rewards.const_data_ptr())},
                                        {static_cast<S*>(returns.mutable_data_ptr())}, data_or_null<bool>(mask),
                                        data_or_null<S>(bootstrap), {{DecayPowers(gamma)}})
        .run();
  });
  return returns;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("discounted_returns", TORCH_BOX(&qrm_fast::discounted_returns)); }
