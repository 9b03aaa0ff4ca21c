// Min-form lambda returns over packed sequences, one reverse scan over maps x -> min(m, b + a x).
// Reads rewards and values once, writes advantages and returns once: 16 bytes per token in fp32; nothing else of length
// T exists. packed/scan.h has the order and its reasons.

#include <limits>

#include "packed/scan.h"

namespace qrm_fast {
namespace {

// Q_t = min(r_t, (1 - lam) V_{t+1} + lam Q_{t+1}); a row reads (1 - lam) V of its successor. The carry at the end of a
// sequence is Q = 0 and (1 - lam) V = bootstrap, so its last row gives min(r, bootstrap).
struct MinGaeRule {
  using Map = ClampedAffine<double>;
  static constexpr int kInputs = 2, kOutputs = 2, kNext = 1;
  static constexpr double kNoBootstrap = std::numeric_limits<double>::infinity();
  static constexpr bool kSameFactor = false;

  double lam;
  DecayPowers decay;

  Carry end(double bootstrap) const { return {0, bootstrap}; }
  double next(double value) const { return (1 - lam) * value; }

  template <int Bytes>
  struct Vectors {
    using L = Lanes<Bytes>;
    using Vec = typename L::Vec;
    struct Maps {
      Vec m, b;
    };
    const double lam;
    const SameFactor<Bytes> decay;

    QRM_FAST_INLINE explicit Vectors(const MinGaeRule& rule) : lam(rule.lam), decay{rule.decay} {}

    template <int K>
    QRM_FAST_INLINE void compose(Maps& maps) const {
      const Vec none = L::broadcast(std::numeric_limits<double>::infinity());
      maps.m = L::minimum(maps.m, maps.b + decay.c[K] * L::template later<K>(maps.m, none));
      maps.b += decay.c[K] * L::template later<K>(maps.b, Vec{});
    }

    QRM_FAST_INLINE Vec next(const Vec* in) const { return (1 - lam) * in[1]; }
    QRM_FAST_INLINE Maps composed(const Vec* in, Vec after) const {
      Maps maps = {in[0], after};
      if (lam == 0) return maps;  // no row waits for another, and 0 * infinity must not count
      compose<1>(maps);
      if constexpr (L::kLanes > 2) compose<2>(maps);
      if constexpr (L::kLanes > 4) compose<4>(maps);
      return maps;
    }
    QRM_FAST_INLINE Map map(const Maps& maps, int64_t lane) const {
      return {maps.m[lane], decay.powers()[lane], maps.b[lane]};
    }
    QRM_FAST_INLINE Vec apply(const Maps& maps, double x) const {
      return L::minimum(maps.m, lam == 0 ? maps.b : maps.b + decay.powers() * x);
    }
    QRM_FAST_INLINE void results(const Vec* in, Vec, Vec x, Vec, Vec* out) const {
      out[0] = x - in[1];
      out[1] = x;
    }
  };
};

std::tuple<Tensor, Tensor> min_gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double lam,
                                   const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  const SameRule<MinGaeRule> rules{{lam, DecayPowers(lam)}};
  const auto [advantages, returns] =
      scan_packed<2>({rewards, values}, cu_seqlens, bootstrap, mask, [&](auto) { return rules; });
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("min_gae", TORCH_BOX(&qrm_fast::min_gae)); }
