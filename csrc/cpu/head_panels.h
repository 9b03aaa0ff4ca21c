// What a head kernel does with a chunk of logits while it is in cache. A chunk is a panel [n][lanes]: one row of the
// batch per SIMD lane, one vocabulary entry per line, so that nothing is ever reduced across lanes and a row's bits
// cannot depend on its neighbours.
#pragma once
#include "gemm.h"
#include "head_tiles.h"

namespace qrm_fast {

// z = softcap(product + bias) / temperature; softcap 0 = none. Divided, because 1 / temperature is already rounded.
template <typename S>
struct PanelTransform {
  const S* bias;  // [n] or null
  S softcap;
  const S* temperature;  // [lanes]
};

// Per lane: the two coefficients of RowGradient divided by the temperature, and the rest of it.
template <typename S>
struct PanelGradient {
  const S *logprob, *entropy, *lse, *lse_residual, *h, *temperature;
  S softcap;
};

template <typename S, int Bytes, int Vectors>
struct PanelTile {
  using V = Simd<S, Bytes>;
  using Vec = typename V::Vec;
  static constexpr int kWidth = Vectors * V::kLanes;
  static constexpr S kNever = -std::numeric_limits<S>::infinity();
  static constexpr int64_t kTerms = 8;

  // Statistics of a lane, as SoftmaxStats: [3][lanes] of max, sum, weighted. Joins `more` into `stats`.
  QRM_FAST_INLINE static void join(S* stats, Vec max, Vec sum, Vec weighted) {
    const Vec old_max = V::load(stats), old_sum = V::load(stats + kWidth), old_weighted = V::load(stats + 2 * kWidth);
    const Vec top = V::max(old_max, max);
    const Vec origin = top == kNever ? Vec{} : top;
    const Vec a = old_max - origin, b = max - origin;
    const Vec scale_a = V::exp(a), scale_b = V::exp(b);
    V::store(stats, top);
    V::store(stats + kWidth, scale_a * old_sum + scale_b * sum);
    const Vec moved_a = old_sum == S(0) ? Vec{} : scale_a * (old_weighted + a * old_sum);
    const Vec moved_b = sum == S(0) ? Vec{} : scale_b * (weighted + b * sum);
    V::store(stats + 2 * kWidth, moved_a + moved_b);
  }

  QRM_FAST_INLINE static void merge(S* stats, const S* more) {
    for (int j = 0; j < kWidth; j += V::kLanes) {
      join(stats + j, V::load(more + j), V::load(more + kWidth + j), V::load(more + 2 * kWidth + j));
    }
  }

  QRM_FAST_INLINE static void finish(S* z, int64_t n, const PanelTransform<S>& t) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < kWidth; j += V::kLanes) {
        Vec x = V::load(z + i * kWidth + j);
        if (t.bias != nullptr) x += t.bias[i];
        if (t.softcap != S(0)) x = V::tanh(x / t.softcap) * t.softcap;
        V::store(z + i * kWidth + j, x / V::load(t.temperature + j));
      }
    }
  }

  // Joins a finished panel to the statistics of its lanes. Sums of kTerms terms are summed: one long chain would lose
  // digits of the entropy.
  QRM_FAST_INLINE static void fold(const S* z, int64_t n, S* stats) {
    for (int j = 0; j < kWidth; j += V::kLanes) {
      Vec top = V::broadcast(kNever);
      for (int64_t i = 0; i < n; ++i) top = V::max(V::load(z + i * kWidth + j), top);
      const Vec origin = top == kNever ? Vec{} : top;  // a lane of -inf has weight 0, one of NaN and -inf stays NaN
      Vec sum = {}, weighted = {};
      for (int64_t first = 0; first < n; first += kTerms) {
        Vec some = {}, some_weighted = {};
        for (int64_t i = first; i < std::min(n, first + kTerms); ++i) {
          const Vec shifted = V::load(z + i * kWidth + j) - origin;
          const Vec e = V::exp(shifted);
          some += e;
          some_weighted += e == S(0) ? Vec{} : shifted * e;
        }
        sum += some;
        weighted += some_weighted;
      }
      join(stats + j, top, sum, weighted);
    }
  }

  // Finished logits -> gradients with respect to the product, without the targets' own terms.
  QRM_FAST_INLINE static void gradient(S* z, int64_t n, const PanelGradient<S>& g) {
    if (g.softcap == S(0)) {
      gradient<false>(z, n, g);
    } else {
      gradient<true>(z, n, g);
    }
  }

 private:
  template <bool Capped>
  QRM_FAST_INLINE static void gradient(S* z, int64_t n, const PanelGradient<S>& g) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < kWidth; j += V::kLanes) {
        const Vec x = V::load(z + i * kWidth + j);
        const Vec logp = (x - V::load(g.lse + j)) - V::load(g.lse_residual + j);
        const Vec p = V::exp(logp);
        Vec d = -p * (V::load(g.logprob + j) + V::load(g.entropy + j) * (logp + V::load(g.h + j)));
        if constexpr (Capped) {
          const Vec y = x * V::load(g.temperature + j) / g.softcap;
          d *= S(1) - y * y;
        }
        V::store(z + i * kWidth + j, p == S(0) ? Vec{} : d);
      }
    }
  }
};

template <typename S>
struct PanelKernels {
  GemmKernel<S> gemm;
  void (*finish)(S* z, int64_t n, const PanelTransform<S>& t);
  void (*fold)(const S* z, int64_t n, S* stats);
  void (*merge)(S* stats, const S* more);
  void (*gradient)(S* z, int64_t n, const PanelGradient<S>& g);
};

#define QRM_FAST_PANEL_KERNELS(NAME, TARGET, BYTES, ROWS, VECTORS)                                        \
  template <typename S>                                                                                   \
  struct NAME {                                                                                           \
    using Panel = PanelTile<S, BYTES, VECTORS>;                                                           \
    TARGET static void tile(const Tile<S>& t) { register_tile<S, BYTES, ROWS, VECTORS>(t); }              \
    TARGET static void finish(S* z, int64_t n, const PanelTransform<S>& t) { Panel::finish(z, n, t); }    \
    TARGET static void fold(const S* z, int64_t n, S* stats) { Panel::fold(z, n, stats); }                \
    TARGET static void merge(S* stats, const S* more) { Panel::merge(stats, more); }                      \
    TARGET static void gradient(S* z, int64_t n, const PanelGradient<S>& g) { Panel::gradient(z, n, g); } \
    static constexpr PanelKernels<S> kernels() {                                                          \
      return {{ROWS, Panel::kWidth, tile}, finish, fold, merge, gradient};                                \
    }                                                                                                     \
  };

QRM_FAST_PANEL_KERNELS(PortablePanel, , 16, 3, 4)
#if defined(__x86_64__)
QRM_FAST_PANEL_KERNELS(Avx2Panel, QRM_FAST_TARGET_AVX2, 32, 6, 2)
QRM_FAST_PANEL_KERNELS(Avx512Panel, QRM_FAST_TARGET_AVX512, 64, 6, 4)
#endif

template <typename S>
const PanelKernels<S>& panel_kernels() {
  static const PanelKernels<S> best = [] {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return Avx512Panel<S>::kernels();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Avx2Panel<S>::kernels();
#endif
    return PortablePanel<S>::kernels();
  }();
  return best;
}

}  // namespace qrm_fast
