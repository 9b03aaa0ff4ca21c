// What is done with a row of logits while it is in cache: finish it (bias, softcap, temperature), fold it into running
// softmax statistics, or turn it into the gradient of the loss with respect to the unfinished logits.
#pragma once
#include "../simd/simd.h"

namespace qrm_fast {

// z = softcap(product + bias) / temperature; softcap 0 = none. Divided, because 1 / temperature is already rounded.
template <typename S>
struct LogitTransform {
  const S* bias;
  S softcap;
  S temperature;

  bool is_identity() const { return bias == nullptr && softcap == S(0) && temperature == S(1); }
};

// Statistics of the columns seen so far: max z, sum e^(z - max), sum (z - max) e^(z - max).
template <typename S>
struct SoftmaxStats {
  S max, sum, weighted;

  static SoftmaxStats empty() { return {-std::numeric_limits<S>::infinity(), S(0), S(0)}; }

  void merge(const SoftmaxStats& other) {
    if (other.sum == S(0)) return;
    if (sum == S(0)) {
      *this = other;
      return;
    }
    const S top = max > other.max ? max : other.max;
    const SoftmaxStats a = rescaled(top), b = other.rescaled(top);
    *this = {top, a.sum + b.sum, a.weighted + b.weighted};
  }

 private:
  SoftmaxStats rescaled(S top) const {
    const S shift = max - top, scale = std::exp(shift);
    return {top, scale * sum, scale * (weighted + shift * sum)};
  }
};

// Coefficients of one row's backward pass: dL/dz_v = logprob ([v = target] - p_v) - entropy p_v (log p_v + H).
template <typename S>
struct RowGradient {
  S logprob, entropy;      // upstream gradients
  S lse, lse_residual, h;  // the forward's results; lse + lse_residual is the log-partition to twice the precision
};

template <typename S, int Bytes>
struct HeadTile {
  using V = Simd<S, Bytes>;
  using Vec = typename V::Vec;
  static constexpr S kNever = -std::numeric_limits<S>::infinity();

  template <typename F>
  QRM_FAST_INLINE static void for_each_vector(S* z, int64_t n, F f) {
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) V::store(z + i, f(V::load(z + i), i, V::kLanes));
    if (i < n) V::store_first(z + i, n - i, f(V::load_first(z + i, n - i, S(0)), i, n - i));
  }

  QRM_FAST_INLINE static void finish(S* z, int64_t n, const LogitTransform<S>& t) {
    for_each_vector(z, n, [&](Vec x, int64_t i, int64_t count) __attribute__((always_inline)) {
      if (t.bias != nullptr) x += count == V::kLanes ? V::load(t.bias + i) : V::load_first(t.bias + i, count, S(0));
      if (t.softcap != S(0)) x = V::tanh(x / t.softcap) * t.softcap;
      return x / t.temperature;
    });
  }

  QRM_FAST_INLINE static SoftmaxStats<S> fold(const S* z, int64_t n) {
    const int64_t whole = n / V::kLanes * V::kLanes;
    const Vec tail = V::load_first(z + whole, n - whole, kNever);
    Vec top = tail;
    for (int64_t i = 0; i < whole; i += V::kLanes) top = V::max(V::load(z + i), top);
    const S max = V::maximum(top);
    const S origin = max == kNever ? S(0) : max;  // a row of -inf has weight 0, one of NaN and -inf stays NaN
    Vec sum = {}, weighted = {};
    const auto add = [&](Vec x) __attribute__((always_inline)) {
      const Vec shifted = x - origin;
      const Vec e = V::exp(shifted);
      sum += e;
      weighted += e == S(0) ? Vec{} : shifted * e;
    };
    for (int64_t i = 0; i < whole; i += V::kLanes) add(V::load(z + i));
    add(tail);
    return {max, V::sum(sum), V::sum(weighted)};
  }

  // Row of finished logits -> row of gradients with respect to the product, without the target's own term.
  QRM_FAST_INLINE static void gradient(S* z, int64_t n, const LogitTransform<S>& t, const RowGradient<S>& g) {
    for_each_vector(z, n, [&](Vec x, int64_t, int64_t) __attribute__((always_inline)) {
      const Vec logp = (x - g.lse) - g.lse_residual;
      const Vec p = V::exp(logp);
      Vec d = -p * (g.logprob + g.entropy * (logp + g.h)) / t.temperature;
      if (t.softcap != S(0)) {
        const Vec y = x * t.temperature / t.softcap;
        d *= S(1) - y * y;
      }
      return p == S(0) ? Vec{} : d;
    });
  }
};

template <typename S>
struct HeadKernels {
  void (*finish)(S* z, int64_t n, const LogitTransform<S>& t);
  SoftmaxStats<S> (*fold)(const S* z, int64_t n);
  void (*gradient)(S* z, int64_t n, const LogitTransform<S>& t, const RowGradient<S>& g);

  template <int Bytes>
  static HeadKernels compiled() {
    using Tile = HeadTile<S, Bytes>;
    return {Compiled<Bytes, Tile::finish>::run, Compiled<Bytes, Tile::fold>::run, Compiled<Bytes, Tile::gradient>::run};
  }
};

template <typename S>
const HeadKernels<S>& head_kernels() {
  static const auto best = widest([](auto bytes) { return HeadKernels<S>::template compiled<bytes>(); });
  return best;
}

}  // namespace qrm_fast
