// Generalised advantage estimation over packed sequences: scan_unit.h with GaeRows.
// Reads rewards and values once, writes advantages and returns once: 16 bytes per token in fp32, 17 with a mask.

#include "scan_launch.h"
#include "scan_rules.h"

namespace qrm_fast {
namespace {

struct GaeRules {
  using Rows = GaeRows;
  Rows rows;
  double gamma;
  const float* lam_per_sequence;
  __device__ Rows operator()(int64_t s) const {
    return {rows.gamma, lam_per_sequence == nullptr ? rows.decay : static_cast<float>(gamma * lam_per_sequence[s])};
  }
};

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double gamma,
                               double lam, const std::optional<Tensor>& lam_per_sequence,
                               const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  Tensor advantages = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  Tensor returns = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  scan_packed(
      {rewards, values}, {advantages, returns}, cu_seqlens, bootstrap, mask,
      GaeRules{
          {static_cast<float>(gamma), static_cast<float>(gamma * lam)}, gamma, data_or_null<float>(lam_per_sequence)});
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("gae", TORCH_BOX(&qrm_fast::gae)); }
