// One row of the tensor that `moments` returns.
#pragma once

namespace qrm_fast {

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;  // sum of squared deviations from the mean
};

}  // namespace qrm_fast
