// Values of steps spread over the rows of their steps. Reads 8 bytes per step and, with a penalty, 4 per row; writes 4
// per row in fp32: bound by memory. Threads take equal parts of the rows, wherever sequences end, and
// fill them by whole vectors whose excess the next step overwrites.
#include "step_rows.h"

#include <algorithm>
#include <cmath>

#include "../dtypes.h"
#include "memory.h"
#include "simd/simd.h"

namespace qrm_fast {
namespace {

constexpr int64_t kVectors = 4;  // at once: most steps then take one turn of the loop, which predicts well

// Rows [begin, end), and up to so many vectors of rows behind them where these lie before `limit`.
template <typename A>
QRM_FAST_INLINE void fill_rows(A value, int64_t begin, int64_t end, int64_t limit, A* rows) {
  using V = Simd<A, kLineBytes>;
  const typename V::Vec all = V::broadcast(value);
  int64_t t = begin;
  for (; t < end && t + kVectors * V::kLanes <= limit; t += kVectors * V::kLanes) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kVectors; ++i) V::store(rows + t + i * V::kLanes, all);
  }
  for (; t < end; ++t) rows[t] = value;
}

// Rows [begin, end), begin before end. I: of the step ends.
template <typename I, typename A>
QRM_FAST_CLONES void write_rows(const StepRows<A>& x, int64_t begin, int64_t end, A* rows) {
  const I* ends = x.steps.template ends<I>();
  const double* values = x.values;
  const A* penalty = x.penalty;
  const Whitening whitening = x.whitening;
  const bool mask_step_ends = x.mask_step_ends;
  const auto fill = [&](double value, int64_t from, int64_t to) __attribute__((always_inline)) {
    if (penalty == nullptr) {
      fill_rows(static_cast<A>(whitening(value)), from, to, end, rows);
    } else {
      for (int64_t t = from; t < to; ++t) rows[t] = whitening(value - penalty[t]);
    }
  };
  int64_t t = begin, i = first_ending_after(x.cu, begin);
  int64_t k = std::lower_bound(ends + x.steps.first(i), ends + x.steps.first(i + 1), begin) - ends;
  for (; t < end; ++i) {
    const int64_t first = x.steps.first(i), last = x.steps.first(i + 1);
    for (; k < last && t < end; ++k) {
      const int64_t next = ends[k] + 1, stop = std::min(next, end);
      fill(values[k], t, stop);
      if (mask_step_ends && stop == next) rows[stop - 1] = 0;
      t = stop;
    }
    // Without a base 0, but NaN where the steps are.
    const double beyond = x.base != nullptr ? x.base[i] : (first == last ? 0 : values[first] - values[first]);
    const int64_t stop = std::min(x.cu[i + 1], end);
    fill(beyond, t, stop);
    t = std::max(t, stop);
  }
}

Tensor step_rows(const Tensor& values, const std::optional<Tensor>& base, const Tensor& step_ends,
                 const Tensor& cu_seqlens, const std::optional<Tensor>& penalty, const std::optional<Tensor>& stats,
                 std::string whitening, int64_t num_tokens, bool mask_step_ends, bool wide) {
  const CuSeqlens cu(cu_seqlens, num_tokens);
  const Steps steps(step_ends, cu);
  const Whitening map = stats.has_value() ? whitening_of(data<Moments>(*stats), whitening) : Whitening{};
  const auto dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor out = fresh_rows(torch::stable::new_empty(values, {0}, dtype), num_tokens);
  dispatch_floating(dtype, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    const StepRows<A> rows{
        cu, steps, data<double>(values), data_or_null<double>(base), data_or_null<A>(penalty), map, mask_step_ends};
    rows.write(num_tokens, mutable_data<A>(out));
  });
  return out;
}

}  // namespace

Whitening whitening_of(const Moments* sets, const std::string& name) {
  const Moments& rows = sets[0];
  if (name == "nonzero") {
    const double variance = (rows.m2 + sets[1].count * rows.mean * rows.mean) / std::max(rows.count, 1.0);
    return {rows.mean, 1 / std::sqrt(std::max(variance, 1e-8)), true};
  }
  STD_TORCH_CHECK(name == "unbiased", "the public functions ask only for known whitenings");
  return {rows.mean, 1 / std::sqrt(rows.m2 / std::max(rows.count - 1, 1.0) + 1e-8)};
}

template <typename A>
void StepRows<A>::write(int64_t num_rows, A* rows) const {
  const auto write_part = steps.wide() ? write_rows<int64_t, A> : write_rows<int32_t, A>;
  const int64_t num_lines = ceil_div(num_rows * sizeof(A), kLineBytes), in_line = kLineBytes / sizeof(A);
  torch::stable::parallel_for(0, num_lines, 256, [&](int64_t begin, int64_t end) {
    write_part(*this, begin * in_line, std::min(end * in_line, num_rows), rows);
  });
}

template struct StepRows<float>;
template struct StepRows<double>;

}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("step_rows", TORCH_BOX(&qrm_fast::step_rows)); }
