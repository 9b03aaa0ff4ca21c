// Rows of any dtype in lanes of double: what is computed from them is rounded once, when it is stored. GCC takes a
// comparison, a broadcast or a conversion of 512 bits apart before it knows the instruction set of the caller; there
// these are written out.
#pragma once
#include <cstring>
#include <limits>

#include "simd.h"

namespace qrm_fast {

template <int Bytes>
struct DoubleLanes : Simd<double, Bytes> {
  using Base = Simd<double, Bytes>;
  using typename Base::Vec;
  static constexpr int kLanes = Base::kLanes;
  typedef float FloatVec __attribute__((vector_size(Bytes / 2)));

  QRM_FAST_INLINE static Vec broadcast(double x) {
#if defined(__x86_64__)
    if constexpr (Bytes > 16) {
      Vec v;
      asm("vbroadcastsd %1, %0" : "=v"(v) : "v"(x));
      return v;
    }
#endif
    return Base::broadcast(x);
  }

  QRM_FAST_INLINE static Vec load(const double* p) { return Base::load(p); }
  QRM_FAST_INLINE static Vec load(const float* p) {
#if defined(__x86_64__)
    if constexpr (Bytes == 64) {
      Vec v;
      asm("vcvtps2pd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const float (*)[kLanes]>(p)));
      return v;
    }
#endif
    FloatVec v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Vec);
  }
  template <typename T>
  QRM_FAST_INLINE static Vec load(const T* p) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(p[i]);
    return load(lanes);
  }
  // Lanes beyond the first `count` read as 0 and are not written.
  template <typename T>
  QRM_FAST_INLINE static Vec load(const T* p, int64_t count) {
    if (count == kLanes) return load(p);
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  QRM_FAST_INLINE static void store(double* p, Vec v) { Base::store(p, v); }
  QRM_FAST_INLINE static void store(float* p, Vec v) {
    const FloatVec narrow = __builtin_convertvector(v, FloatVec);
    std::memcpy(p, &narrow, sizeof narrow);
  }
  template <typename S>
  QRM_FAST_INLINE static void store(S* p, int64_t count, Vec v) {
    if (count == kLanes) return store(p, v);
    S lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }

  // `then` where a < b, so not where one is NaN.
  QRM_FAST_INLINE static Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
#if defined(__x86_64__)
    if constexpr (Bytes == 64) return where<17>(a, b, then, otherwise);
#endif
    return a < b ? then : otherwise;
  }
  QRM_FAST_INLINE static Vec where_equal(Vec a, Vec b, Vec then, Vec otherwise) {
#if defined(__x86_64__)
    if constexpr (Bytes == 64) return where<0>(a, b, then, otherwise);
#endif
    return a == b ? then : otherwise;
  }

  // Simd::exp for any x: infinity beyond 709.
  QRM_FAST_INLINE static Vec exp(Vec x) {
    const Vec in_range = where_less(x, broadcast(Base::kLowestExp), Vec{}, Base::exp_in_range(x));
    const Vec bounded = where_less(broadcast(709), x, broadcast(std::numeric_limits<double>::infinity()), in_range);
    return where_equal(x, x, bounded, x);
  }

#if defined(__x86_64__)
 private:
  // By a predicate of vcmppd: 0 is equal, 17 less, both quiet.
  template <int Predicate>
  QRM_FAST_INLINE static Vec where(Vec a, Vec b, Vec then, Vec otherwise) {
    Vec out;
    asm("vcmppd %5, %2, %1, %%k1\n\tvblendmpd %3, %4, %0%{%%k1%}"
        : "=v"(out)
        : "v"(a), "v"(b), "v"(then), "v"(otherwise), "i"(Predicate)
        : "k1");
    return out;
  }
#endif
};

}  // namespace qrm_fast
