// Vectors of any width, written once with the compiler's vector extension. Everything here is inlined into a function
// that is compiled for an instruction set (instruction_set.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "instruction_set.h"

namespace qrm_fast {

inline constexpr int64_t kLineBytes = 64;  // of a cache line

// Reduces n values, a power of two, by folding halves onto each other: a fixed order that vectorises.
template <typename S, typename Op>
QRM_FAST_INLINE S fold_halves(S* x, int64_t n, Op op) {
  for (int64_t half = n / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] = op(x[i], x[i + half]);
  }
  return x[0];
}
template <typename S>
QRM_FAST_INLINE S sum_halves(S* x, int64_t n) {
  return fold_halves(x, n, [](S a, S b) { return a + b; });
}

template <typename S, int Bytes>
struct Simd {
  static constexpr int kLanes = Bytes / sizeof(S);
  using Int = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  typedef S Vec __attribute__((vector_size(Bytes)));
  typedef Int IntVec __attribute__((vector_size(Bytes)));

  QRM_FAST_INLINE static Vec load(const S* p) {
    Vec v;
    std::memcpy(&v, p, Bytes);
    return v;
  }
  QRM_FAST_INLINE static void store(S* p, Vec v) { std::memcpy(p, &v, Bytes); }
  QRM_FAST_INLINE static Vec broadcast(S x) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = x;
    return v;
  }

  // Lanes beyond the first `count` read as `fill`.
  QRM_FAST_INLINE static Vec load_first(const S* p, int64_t count, S fill) {
    Vec v = broadcast(fill);
    std::memcpy(&v, p, count * sizeof(S));
    return v;
  }
  QRM_FAST_INLINE static void store_first(S* p, int64_t count, Vec v) { std::memcpy(p, &v, count * sizeof(S)); }

  // 0 in lanes beyond the first `count`.
  QRM_FAST_INLINE static Vec keep_first(Vec v, int64_t count) {
    Vec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < static_cast<S>(count) ? v : Vec{};
  }

  // A NaN in `a` is dropped: callers see it again in the sums.
  QRM_FAST_INLINE static Vec max(Vec a, Vec b) { return a > b ? a : b; }

  template <typename Op>
  QRM_FAST_INLINE static S reduce(Vec v, Op op) {
    S lanes[kLanes];
    std::memcpy(lanes, &v, Bytes);
    return fold_halves(lanes, kLanes, op);
  }
  QRM_FAST_INLINE static S sum(Vec v) {
    return reduce(v, [](S a, S b) { return a + b; });
  }
  QRM_FAST_INLINE static S maximum(Vec v) {
    return reduce(v, [](S a, S b) { return a > b ? a : b; });
  }

  static constexpr S kLowestExp = sizeof(S) == 4 ? S(-87.33654) : S(-708.396);  // below it exp is subnormal

  // exp(x) for x <= 88 (709 for double), below 2 ulp; 0 where the result would be subnormal; NaN stays NaN.
  QRM_FAST_INLINE static Vec exp(Vec x) { return x < kLowestExp ? Vec{} : (x == x ? exp_in_range(x) : x); }

  // exp(x) without its comparisons, for kLowestExp <= x <= 88 (709); any value elsewhere, also for NaN.
  // x = n log 2 + r with |r| <= log(2)/2, exp(r) by its Taylor polynomial, times 2^n through the exponent bits.
  QRM_FAST_INLINE static Vec exp_in_range(Vec x) {
    constexpr bool f32 = sizeof(S) == 4;
    constexpr S kRound = f32 ? S(12582912.0) : S(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52
    constexpr S kLog2Hi = f32 ? S(0.693359375) : S(6.93147180369123816490e-01);
    constexpr S kLog2Lo = f32 ? S(-2.12194440e-4) : S(1.90821492927058770002e-10);
    const Vec shifted = x * S(1.4426950408889634) + kRound;
    const Vec n = shifted - kRound;
    const Vec r = (x - n * kLog2Hi) - n * kLog2Lo;
    constexpr double kInverseFactorial[] = {1.0,
                                            1.0,
                                            0.5,
                                            1.6666666666666666e-01,
                                            4.1666666666666664e-02,
                                            8.3333333333333332e-03,
                                            1.3888888888888889e-03,
                                            1.9841269841269841e-04,
                                            2.4801587301587302e-05,
                                            2.7557319223985893e-06,
                                            2.7557319223985888e-07,
                                            2.5052108385441720e-08,
                                            2.0876756987868100e-09,
                                            1.6059043836821613e-10};
    const auto c = [&](int i) __attribute__((always_inline)) { return S(kInverseFactorial[i]); };
    Vec p;
    if constexpr (f32) {
      p = broadcast(c(7));
#pragma GCC unroll 7
      for (int i = 6; i >= 0; --i) p = p * r + c(i);
    } else {  // in pairs, which wait for each other half as long, but the leading terms as above
      const Vec r2 = r * r, r4 = r2 * r2;
      const Vec low = (c(2) + c(3) * r) + r2 * (c(4) + c(5) * r);
      const Vec middle = (c(6) + c(7) * r) + r2 * (c(8) + c(9) * r);
      const Vec high = (c(10) + c(11) * r) + r2 * (c(12) + c(13) * r);
      p = S(1) + (r + r2 * (low + r4 * (middle + r4 * high)));
    }
    IntVec bits, shift;
    std::memcpy(&bits, &p, Bytes);
    std::memcpy(&shift, &shifted, Bytes);
    bits += shift << (f32 ? 23 : 52);
    std::memcpy(&p, &bits, Bytes);
    return p;
  }

  // tanh(x), below 4 ulp: Cephes' polynomial for |x| < 0.625, 1 - 2 / (exp(2|x|) + 1) beyond.
  QRM_FAST_INLINE static Vec tanh(Vec x) {
    if constexpr (sizeof(S) == 8) {
      S lanes[kLanes];
      std::memcpy(lanes, &x, Bytes);
      for (S& lane : lanes) lane = std::tanh(lane);
      return load(lanes);
    } else {
      const Vec magnitude = x < Vec{} ? -x : x;
      const Vec capped = magnitude > S(20) ? broadcast(20) : magnitude;
      const Vec far = S(1) - S(2) / (exp(capped + capped) + S(1));
      const Vec s = x * x;
      const Vec poly =
          ((((S(-5.70498872745e-3) * s + S(2.06390887954e-2)) * s + S(-5.37397155531e-2)) * s + S(1.33314422036e-1)) *
               s +
           S(-3.33332819422e-1)) *
              s * x +
          x;
      return magnitude < S(0.625) ? poly : (x == x ? (x < Vec{} ? -far : far) : x);
    }
  }
};

}  // namespace qrm_fast
