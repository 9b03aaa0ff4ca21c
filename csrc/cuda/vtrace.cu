// V-trace over packed sequences: scan_unit.h with VtraceRows.
// Reads rewards, values and ratios once, writes targets and advantages once: 20 bytes per token in fp32, 21 with a
// mask.

#include "scan_launch.h"
#include "scan_rules.h"

namespace qrm_fast {
namespace {

std::tuple<Tensor, Tensor> vtrace(const Tensor& rewards, const Tensor& values, const Tensor& ratios,
                                  const Tensor& cu_seqlens, double gamma, double lam, double rho_bar, double c_bar,
                                  const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  Tensor targets = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  Tensor advantages = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  const SameRows<VtraceRows> rules{{static_cast<float>(gamma), static_cast<float>(gamma * lam),
                                    static_cast<float>(rho_bar), static_cast<float>(c_bar)}};
  scan_packed({rewards, values, ratios}, {targets, advantages}, cu_seqlens, bootstrap, mask, rules);
  return {targets, advantages};
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("vtrace", TORCH_BOX(&qrm_fast::vtrace)); }
