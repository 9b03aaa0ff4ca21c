// Min-form lambda returns over packed sequences: scan_unit.h with MinRows.
// Reads rewards and values once, writes advantages and returns once: 16 bytes per token in fp32, 17 with a mask.

#include "scan_launch.h"
#include "scan_rules.h"

namespace qrm_fast {
namespace {

std::tuple<Tensor, Tensor> min_gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, double lam,
                                   const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  Tensor advantages = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  Tensor returns = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  const SameRows<MinRows> rules{{static_cast<float>(lam), static_cast<float>(1 - lam)}};
  scan_packed({rewards, values}, {advantages, returns}, cu_seqlens, bootstrap, mask, rules);
  return {advantages, returns};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("min_gae", TORCH_BOX(&qrm_fast::min_gae)); }
