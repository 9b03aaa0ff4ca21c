// Rows of any dtype in lanes of double; a result is rounded once, when it is stored. For code that Compiled compiles:
// GCC splits a comparison, a broadcast or a conversion of 512 bits into lanes before it inlines it into a function with
// such registers, so these are written as instructions.
#pragma once
#include <cstring>
#include <limits>

#include "../../maps.h"
#include "simd.h"

namespace qrm_fast {

template <int Bytes>
struct Lanes : Simd<double, Bytes> {
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
  // Lanes beyond the first `count` <= kLanes read as 0 and are not written.
  template <typename T>
  QRM_FAST_INLINE static Vec load_first(const T* p, int64_t count) {
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
  QRM_FAST_INLINE static void store_first(S* p, int64_t count, Vec v) {
    if (count == kLanes) return store(p, v);
    S lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
  // The last `count` lanes, 0 < count < kLanes, to p[0..count): two overlapping copies of a fixed size, which are
  // faster than one of a variable size.
  template <typename S>
  QRM_FAST_INLINE static void store_last(S* p, int64_t count, Vec v) {
    S lanes[kLanes];
    store(lanes, v);
    if (count >= 4) {
      copy_ends<4>(p, lanes + kLanes - count, count);
    } else if (count >= 2) {
      copy_ends<2>(p, lanes + kLanes - count, count);
    } else {
      *p = lanes[kLanes - 1];
    }
  }

  // Lane i of the result is lane i + K of v, continued by the first lanes of `after`.
  template <int K>
  QRM_FAST_INLINE static Vec later(Vec v, Vec after) {
    if constexpr (kLanes == 8) {
      return __builtin_shufflevector(v, after, K, K + 1, K + 2, K + 3, K + 4, K + 5, K + 6, K + 7);
    } else if constexpr (kLanes == 4) {
      return __builtin_shufflevector(v, after, K, K + 1, K + 2, K + 3);
    } else {
      return __builtin_shufflevector(v, after, K, K + 1);
    }
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

  // NaN wins.
  QRM_FAST_INLINE static Vec minimum(Vec a, Vec b) {
#if defined(__x86_64__)
    Vec least;  // vminpd gives a where one is NaN
    if constexpr (Bytes == 64) {
      asm("vminpd %1, %2, %0\n\tvcmpunordpd %2, %2, %%k1\n\tvmovapd %2, %0%{%%k1%}"
          : "=&v"(least)
          : "v"(a), "v"(b)
          : "k1");
      return least;
    } else if constexpr (Bytes == 32) {
      Vec unordered;
      asm("vminpd %2, %3, %0\n\tvcmpunordpd %3, %3, %1\n\tvblendvpd %1, %3, %0, %0"
          : "=&x"(least), "=&x"(unordered)
          : "x"(a), "x"(b));
      return least;
    }
#endif
    Vec out;
    for (int i = 0; i < kLanes; ++i) out[i] = qrm_fast::minimum(a[i], b[i]);
    return out;
  }

 private:
  template <int Size, typename S>
  QRM_FAST_INLINE static void copy_ends(S* p, const S* from, int64_t count) {
    S head[Size], tail[Size];
    std::memcpy(head, from, sizeof head);
    std::memcpy(tail, from + count - Size, sizeof tail);
    std::memcpy(p, head, sizeof head);
    std::memcpy(p + count - Size, tail, sizeof tail);
  }

#if defined(__x86_64__)
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
