// One row of the tensor that `moments` returns, and how rows and sets become one.
#pragma once
#include <cstdint>

namespace qrm_fast {

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;  // sum of squared deviations from the mean
};

// The moments of a union, about the first part's mean: exact where all means agree.
template <typename Part>
Moments join(int64_t num_parts, Part&& part) {
  double count = 0, sum = 0, m2 = 0, origin = 0;
  for (int64_t i = 0; i < num_parts; ++i) {
    const Moments p = part(i);
    if (count == 0) origin = p.mean;
    count += p.count;
    sum += p.count * (p.mean - origin);
  }
  if (count == 0) return {};
  const double mean = origin + sum / count;
  for (int64_t i = 0; i < num_parts; ++i) {
    const Moments p = part(i);
    m2 += p.m2 + p.count * (p.mean - mean) * (p.mean - mean);
  }
  return {count, mean, m2};
}

// The moments of the counted rows of one set, cut into blocks from its first row.
template <typename T>
Moments row_moments(const T* x, const bool* mask, int64_t num_rows);

}  // namespace qrm_fast
