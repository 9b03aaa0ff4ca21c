// Whitening, given the moments: reads x and the mask once and writes once, 9 bytes per token in fp32. Arithmetic is in
// double and rounded once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "../dtypes.h"
#include "moments.h"
#include "simd/instruction_set.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

template <typename T>
QRM_FAST_CLONES void whiten_rows(const T* x, const bool* mask, int64_t begin, int64_t end, double shift, double scale,
                                 acc_t<T>* y) {
  for (int64_t t = begin; t < end; ++t) y[t] = (static_cast<double>(static_cast<acc_t<T>>(x[t])) - shift) * scale;
  if (mask != nullptr) {
    for (int64_t t = begin; t < end; ++t) y[t] = mask[t] ? y[t] : 0;
  }
}

Tensor whiten(const Tensor& x, const Tensor& stats, const std::optional<Tensor>& mask, bool center, bool unbiased,
              double eps) {
  const int64_t num_tokens = x.size(0);
  const Moments batch = *static_cast<const Moments*>(stats.const_data_ptr());
  const double variance = batch.m2 / std::max(batch.count - unbiased, 1.0);
  const double scale = variance != 0 ? 1 / std::sqrt(variance + eps) : 0;
  const double shift = center ? batch.mean : 0;
  Tensor out = torch::stable::new_empty(x, {num_tokens}, acc_dtype(x.scalar_type()));
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* rows = static_cast<const T*>(x.const_data_ptr());
    const bool* m = data_or_null<bool>(mask);
    acc_t<T>* y = static_cast<acc_t<T>*>(out.mutable_data_ptr());
    constexpr int64_t BT = 4096;  // rows whose mask pass finds them still in cache
    torch::stable::parallel_for(0, (num_tokens + BT - 1) / BT, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        whiten_rows(rows, m, b * BT, std::min((b + 1) * BT, num_tokens), shift, scale, y);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("whiten", TORCH_BOX(&qrm_fast::whiten)); }
