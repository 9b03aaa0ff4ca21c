// Rows of any dtype in lanes of double: terms of a loss are computed without rounding and rounded once when stored.
#pragma once
#include <cstring>

#include "simd.h"

namespace qrm_fast {

// Lanes beyond the first `count` read as 0 and are not written.
template <int Bytes>
struct DoubleLanes : Simd<double, Bytes> {
  using typename Simd<double, Bytes>::Vec;
  static constexpr int kLanes = Simd<double, Bytes>::kLanes;
  typedef float FloatVec __attribute__((vector_size(Bytes / 2)));

  QRM_FAST_INLINE static Vec load(const double* p, int64_t count) {
    Vec v{};
    std::memcpy(&v, p, count * sizeof(double));
    return v;
  }
  QRM_FAST_INLINE static Vec load(const float* p, int64_t count) {
    FloatVec v{};
    std::memcpy(&v, p, count * sizeof(float));
    return __builtin_convertvector(v, Vec);
  }
  template <typename T>
  QRM_FAST_INLINE static Vec load(const T* p, int64_t count) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<float>(p[i]);
    return load(lanes, kLanes);
  }
  QRM_FAST_INLINE static void store(double* p, int64_t count, Vec v) { std::memcpy(p, &v, count * sizeof(double)); }
  QRM_FAST_INLINE static void store(float* p, int64_t count, Vec v) {
    const FloatVec narrow = __builtin_convertvector(v, FloatVec);
    std::memcpy(p, &narrow, count * sizeof(float));
  }
};

}  // namespace qrm_fast
