// The maps of a reverse scan. A row maps the state x of the row after it to its own state; the rows of a run compose to
// one map of the same form. So threads compose runs independently, before the state behind a run is known.
#pragma once
#include <cmath>

#include "indices.h"

namespace qrm_fast {

// Smallest normal numbers, spelled out because std::numeric_limits is no device code.
template <typename A>
constexpr A kSmallest = static_cast<A>(sizeof(A) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);

// b + a * x. Device code of a rule stands in several places, and all must round alike.
template <typename A>
QRM_FAST_HOST_DEVICE inline A multiply_add(A a, A x, A b) {
#if defined(__CUDA_ARCH__)
  return fma(a, x, b);
#else
  return b + a * x;
#endif
}

// a * b, but zero only if a factor is zero: where the product underflows, an infinite or NaN state still comes through,
// as in a loop over the rows.
template <typename A>
QRM_FAST_HOST_DEVICE inline A decay_product(A a, A b) {
  const A p = a * b;
  return p == A(0) && a != A(0) && b != A(0) ? kSmallest<A> : p;
}

template <typename A>
QRM_FAST_HOST_DEVICE inline A decay_power(A a, int64_t n) {
  A power = 1;
  for (; n > 0; n /= 2, a = decay_product(a, a)) {
    if (n % 2) power = decay_product(power, a);
  }
  return power;
}

// NaN wins, as in torch.minimum.
template <typename A>
QRM_FAST_HOST_DEVICE inline A minimum(A a, A b) {
  return a < b || a != a ? a : b;
}

// x -> b + a x
template <typename A>
struct Affine {
  A a, b;

  QRM_FAST_HOST_DEVICE static Affine identity() { return {A(1), A(0)}; }
  QRM_FAST_HOST_DEVICE A operator()(A x) const { return multiply_add(a, x, b); }
  // The map of these rows followed by the later ones.
  QRM_FAST_HOST_DEVICE Affine after(const Affine& later) const {
    return {decay_product(a, later.a), multiply_add(a, later.b, b)};
  }
};

// x -> min(m, b + a x), a >= 0. A factor of zero drops its term, because x may be infinite: a row without a step
// reward.
template <typename A>
struct ClampedAffine {
  A m, a, b;

  QRM_FAST_HOST_DEVICE static ClampedAffine identity() { return {static_cast<A>(INFINITY), A(1), A(0)}; }
  QRM_FAST_HOST_DEVICE A operator()(A x) const { return minimum(m, shifted(x)); }
  QRM_FAST_HOST_DEVICE ClampedAffine after(const ClampedAffine& later) const {
    return {minimum(m, shifted(later.m)), decay_product(a, later.a), shifted(later.b)};
  }

 private:
  QRM_FAST_HOST_DEVICE A shifted(A x) const { return a == A(0) ? b : multiply_add(a, x, b); }
};

}  // namespace qrm_fast
