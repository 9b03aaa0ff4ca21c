// Index arithmetic of the host and of the device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define QRM_FAST_HOST_DEVICE __host__ __device__
#else
#define QRM_FAST_HOST_DEVICE
#endif

namespace qrm_fast {

QRM_FAST_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
QRM_FAST_HOST_DEVICE inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The first sequence that has a row at or after row t.
template <typename Cu>
QRM_FAST_HOST_DEVICE inline int64_t first_ending_after(const Cu& cu, int64_t t) {
  int64_t low = 0, high = cu.num_sequences();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu[middle + 1] > t) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace qrm_fast
