// The scalar head of token_q for other kernels.
#pragma once
#include <cstdint>

#include "../dtypes.h"

namespace qrm_fast {

// sum of x_i w_i, split over lanes by i alone: its bits depend on nothing but x and w.
template <typename T>
acc_t<T> row_dot(const T* x, const T* w, int64_t n);

}  // namespace qrm_fast
