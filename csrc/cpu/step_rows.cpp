// Values of steps spread over the rows of their steps. Reads 8 bytes per step and, with a penalty, 4 per row; writes 4
// per row in fp32: memory decides the speed. Rows are cut at sequences, which run in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "cu_seqlens.h"
#include "dtypes.h"
#include "fresh_rows.h"
#include "moments.h"
#include "steps.h"
#include "target_clones.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

// y = (x - shift) * scale; an x of exactly 0 stays where `keep_zeros`.
struct Affine {
  double shift = 0;
  double scale = 1;
  bool keep_zeros = false;

  double operator()(double x) const { return keep_zeros && x == 0 ? 0 : (x - shift) * scale; }
};

// Whitening, given the moments of the counted rows and, as the second set, the count of those left at 0.
Affine whitening_of(const std::optional<Tensor>& stats, const std::string& name) {
  if (!stats.has_value()) return {};
  const Moments* sets = static_cast<const Moments*>(stats->const_data_ptr());
  const Moments& rows = sets[0];
  if (name == "nonzero") {
    const double variance = (rows.m2 + sets[1].count * rows.mean * rows.mean) / std::max(rows.count, 1.0);
    return {rows.mean, 1 / std::sqrt(std::max(variance, 1e-8)), true};
  }
  STD_TORCH_CHECK(name == "unbiased", "the public functions ask only for known whitenings");
  return {rows.mean, 1 / std::sqrt(rows.m2 / std::max(rows.count - 1, 1.0) + 1e-8)};
}

template <typename A>
QRM_FAST_TARGET_CLONES void fill_rows(double value, const A* penalty, const Affine& affine, int64_t begin, int64_t end,
                                      A* rows) {
  if (penalty == nullptr) {
    std::fill(rows + begin, rows + end, static_cast<A>(affine(value)));
  } else {
    for (int64_t t = begin; t < end; ++t) rows[t] = affine(value - penalty[t]);
  }
}

Tensor step_rows(const Tensor& values, const std::optional<Tensor>& base, const Tensor& step_ends,
                 const Tensor& cu_seqlens, const std::optional<Tensor>& penalty, const std::optional<Tensor>& stats,
                 std::string whitening, int64_t num_tokens, bool mask_step_ends, bool wide) {
  const CuSeqlens cu(cu_seqlens, num_tokens);
  const Steps steps(step_ends, cu);
  const double* v = static_cast<const double*>(values.const_data_ptr());
  const double* b = data_or_null<double>(base);
  const Affine map = whitening_of(stats, whitening);
  const auto dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor out = fresh_rows(torch::stable::new_empty(values, {0}, dtype), num_tokens);
  dispatch_floating(dtype, [&](auto zero) {
    using A = acc_t<decltype(zero)>;
    const A* p = data_or_null<A>(penalty);
    A* rows = static_cast<A*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, cu.num_sequences(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = steps.first(i), last = steps.first(i + 1);
        for (int64_t k = first; k < last; ++k) {
          fill_rows(v[k], p, map, steps.begin(i, k), steps.end(k) + 1, rows);
          if (mask_step_ends) rows[steps.end(k)] = 0;
        }
        // Without a base 0, but NaN where the steps are.
        const double beyond = b != nullptr ? b[i] : (first == last ? 0 : v[first] - v[first]);
        fill_rows(beyond, p, map, steps.begin(i, last), cu[i + 1], rows);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("step_rows", TORCH_BOX(&qrm_fast::step_rows)); }
