// Discounted returns over packed sequences: scan_unit.h with ReturnRows.
// Reads rewards once and writes returns once: 8 bytes per token in fp32, 9 with a mask.

#include "scan_launch.h"
#include "scan_rules.h"

namespace qrm_fast {
namespace {

Tensor discounted_returns(const Tensor& rewards, const Tensor& cu_seqlens, double gamma,
                          const std::optional<Tensor>& bootstrap, const std::optional<Tensor>& mask) {
  Tensor returns = torch::stable::new_empty(rewards, {rewards.size(0)}, ScalarType::Float);
  const SameRows<ReturnRows> rules{{static_cast<float>(gamma)}};
  scan_packed({rewards}, {returns}, cu_seqlens, bootstrap, mask, rules);
  return returns;
}

}  // namespace
}  // namespace qrm_fast

STABLE_TORCH_LIBRARY_IMPL(qrm_fast, CUDA, m) { m.impl("discounted_returns", TORCH_BOX(&qrm_fast::discounted_returns)); }
