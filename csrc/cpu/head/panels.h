// What a head kernel does with a chunk of logits while it is in cache. A chunk is a panel [n][lanes]: one row of the
// batch per SIMD lane, one vocabulary entry per line, so that nothing is ever reduced across lanes and a row's bits
// cannot depend on its neighbours.
#pragma once
#include <algorithm>
#include <array>

#include "gemm.h"
#include "tiles.h"

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

  // Statistics of a lane, as SoftmaxStats: [3][lanes] of max, sum, weighted. Joins `more` into `stats`. A shift is
  // bounded by what exp tells from 0, so that one of -inf, whose sums are 0, adds 0.
  QRM_FAST_INLINE static void join(S* stats, Vec max, Vec sum, Vec weighted) {
    const Vec old_max = V::load(stats), old_sum = V::load(stats + kWidth), old_weighted = V::load(stats + 2 * kWidth);
    const Vec top = V::max(old_max, max), lowest = V::broadcast(V::kLowestExp);
    const Vec origin = top == kNever ? Vec{} : top;
    const Vec a = V::max(lowest, old_max - origin), b = V::max(lowest, max - origin);
    const Vec scale_a = V::exp(a), scale_b = V::exp(b);
    V::store(stats, top);
    V::store(stats + kWidth, scale_a * old_sum + scale_b * sum);
    V::store(stats + 2 * kWidth, scale_a * (old_weighted + a * old_sum) + scale_b * (weighted + b * sum));
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
    Vec top[Vectors];
    for (Vec& t : top) t = V::broadcast(kNever);
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) top[j] = V::max(V::load(z + i * kWidth + j * V::kLanes), top[j]);
    }
    for (int j = 0; j < Vectors; ++j) {
      const S* lane = z + j * V::kLanes;
      const Vec origin = top[j] == kNever ? Vec{} : top[j];  // a lane of -inf has weight 0
      Vec sum = {}, weighted = {};
      for (int64_t first = 0; first < n; first += kTerms) {
        Vec some = {}, some_weighted = {};
        for (int64_t i = first; i < std::min(n, first + kTerms); ++i) {
          const Vec shifted = V::load(lane + i * kWidth) - origin;
          const auto gone = shifted < V::kLowestExp;
          const Vec e = V::exp_in_range(shifted);
          some += gone ? Vec{} : e;
          some_weighted += gone ? Vec{} : shifted * e;
        }
        sum += some;
        weighted += some_weighted;
      }
      sum += weighted - weighted;  // NaN, which exp_in_range does not keep, reached the weighted sum
      join(stats + j * V::kLanes, top[j], sum, weighted);
    }
  }

  // Finished logits -> gradients with respect to the product, without the targets' own terms.
  QRM_FAST_INLINE static void gradient(S* z, int64_t n, const PanelGradient<S>& g) {
    g.softcap == S(0) ? capped_gradient<false>(z, n, g) : capped_gradient<true>(z, n, g);
  }

 private:
  template <bool Capped>
  QRM_FAST_INLINE static void capped_gradient(S* z, int64_t n, const PanelGradient<S>& g) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < kWidth; j += V::kLanes) {
        const Vec x = V::load(z + i * kWidth + j);
        const Vec logp = (x - V::load(g.lse + j)) - V::load(g.lse_residual + j);
        const Vec p = V::exp_in_range(logp);  // NaN comes back with the factor logp
        Vec d = -p * (V::load(g.logprob + j) + V::load(g.entropy + j) * (logp + V::load(g.h + j)));
        if constexpr (Capped) {
          const Vec y = x * V::load(g.temperature + j) / g.softcap;
          d *= S(1) - y * y;
        }
        V::store(z + i * kWidth + j, logp < V::kLowestExp ? Vec{} : d);
      }
    }
  }
};

template <typename S>
struct PanelKernels {
  GemmKernel<S> gemm;
  void (*pair_tile)(const Tile<S>& t);  // the same for pairs of bfloat16, null where the processor has none
  void (*finish)(S* z, int64_t n, const PanelTransform<S>& t);
  void (*fold)(const S* z, int64_t n, S* stats);
  void (*merge)(S* stats, const S* more);
  void (*gradient)(S* z, int64_t n, const PanelGradient<S>& g);

  // The tile fills the set's registers: 16 of 16 or 32 bytes, or 32 of 64. One of a `Share` of the vectors is higher.
  template <int Bytes, int Share = 1>
  static PanelKernels compiled() {
    constexpr int kMost = Bytes == 32 ? 2 : 4, kLeast = kAheadSteps * sizeof(S) / Bytes;
    constexpr int kVectors = std::max({1, kLeast, kMost / Share});
    constexpr int kTileRows = std::min(12, (Bytes == 16 ? 3 : 6) * kMost / kVectors);
    using Panel = PanelTile<S, Bytes, kVectors>;
    PanelKernels kernels{{kTileRows, Panel::kWidth, Compiled<Bytes, register_tile<S, Bytes, kTileRows, kVectors>>::run},
                         nullptr,
                         Compiled<Bytes, Panel::finish>::run,
                         Compiled<Bytes, Panel::fold>::run,
                         Compiled<Bytes, Panel::merge>::run,
                         Compiled<Bytes, Panel::gradient>::run};
    if constexpr (Bytes == 64 && sizeof(S) == 4) {
      if (__builtin_cpu_supports("avx512bf16")) {
        kernels.pair_tile = Compiled<Bytes, register_tile<S, Bytes, kTileRows, kVectors, true>>::run_bf16;
      }
    }
    return kernels;
  }
};

// With the fewest lanes that hold all rows, for the others compute for nothing, or with the most. A row's bits are the
// same in each.
template <typename S>
const PanelKernels<S>& panel_kernels(int64_t rows) {
  using Kernels = PanelKernels<S>;
  static const auto sizes = widest([](auto bytes) {
    return std::array{Kernels::template compiled<bytes, 4>(), Kernels::template compiled<bytes, 2>(),
                      Kernels::template compiled<bytes>()};
  });
  for (const Kernels& kernels : sizes) {
    if (rows <= kernels.gemm.nr) return kernels;
  }
  return sizes.back();
}

}  // namespace qrm_fast
