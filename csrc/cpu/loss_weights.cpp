// The weight of every token in the loss: counts the mask per sequence, then fills. Reads the mask twice and writes the
// weights once, 6 bytes per token. Counts are integers, so no order of summation shows in the bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "../dtypes.h"
#include "packed/cu_seqlens.h"

namespace qrm_fast {
namespace {

using torch::stable::Tensor;

Tensor loss_weights(const Tensor& cu_seqlens, const std::optional<Tensor>& mask, int64_t num_tokens, std::string mode,
                    double total, double norm) {
  const CuSeqlens cu(cu_seqlens, num_tokens);
  const int64_t num_sequences = cu.num_sequences();
  const bool* m = data_or_null<bool>(mask);
  std::vector<int64_t> counts(num_sequences);
  torch::stable::parallel_for(0, num_sequences, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      counts[i] = m == nullptr ? cu[i + 1] - cu[i] : std::count(m + cu[i], m + cu[i + 1], true);
    }
  });
  if (total == 0) {
    total = mode == "token-mean" ? std::accumulate(counts.begin(), counts.end(), int64_t{0})
                                 : num_sequences - std::count(counts.begin(), counts.end(), 0);
  }
  const bool per_sequence_mean = mode == "seq-mean-token-mean";
  Tensor weights = torch::stable::new_empty(cu_seqlens, {num_tokens}, ScalarType::Float);
  float* w = static_cast<float*>(weights.mutable_data_ptr());
  torch::stable::parallel_for(0, num_sequences, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float weight = 1 / (total * norm * (per_sequence_mean ? counts[i] : 1));
      for (int64_t t = cu[i]; t < cu[i + 1]; ++t) w[t] = m == nullptr || m[t] ? weight : 0;
    }
  });
  return weights;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CPU, m) { m.impl("loss_weights", TORCH_BOX(&qrm_fast::loss_weights)); }
