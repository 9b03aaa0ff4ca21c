// Values of steps over the rows of their steps, whitened on the way: what step_rows and process_advantages share.
#pragma once
#include <cstdint>
#include <string>

#include "moments.h"
#include "packed/cu_seqlens.h"
#include "packed/steps.h"

namespace qrm_fast {

// y = (x - shift) * scale; an x of exactly 0 stays where `keep_zeros`.
struct Whitening {
  double shift = 0;
  double scale = 1;
  bool keep_zeros = false;

  double operator()(double x) const { return keep_zeros && x == 0 ? 0 : (x - shift) * scale; }
};

// Given the moments of the counted rows and, as the second set, the count of those left at 0; null: no whitening.
Whitening whitening_of(const Moments* sets, const std::string& name);

template <typename A>
struct StepRows {
  const CuSeqlens& cu;
  const Steps& steps;
  const double* values;  // [K]
  const double* base;    // [S], of the rows after a sequence's last step; null: 0, but NaN where the steps are
  const A* penalty;      // [T] or null
  Whitening whitening;
  bool mask_step_ends;

  // Writes rows [0, num_rows).
  void write(int64_t num_rows, A* rows) const;
};

}  // namespace qrm_fast
