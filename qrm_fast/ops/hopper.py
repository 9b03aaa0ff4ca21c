"""Steps of the heads in CUDA C++ for Hopper: not ops that stand for themselves, so they have no reference.

csrc/cuda serves them, where it is compiled; qrm_fast/triton/product.py asks before anything calls them.
"""

import torch

SCHEMAS = {
    "head_fold": "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperatures, float? softcap, "
    "Tensor(a!) statistics, Tensor(b!) target_logits, Tensor(c!)? kept, Tensor(d!)? tops, Tensor(e!)? running) -> ()",
    "q_values_fold": "(Tensor policy_hidden, Tensor policy_weight, Tensor q_hidden, Tensor q_weight, Tensor targets, "
    "Tensor? temperatures, float beta, Tensor(a!) sums, Tensor(b!) target_logits) -> ()",
    "head_dz": "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperatures, float? softcap, "
    "Tensor factors, Tensor lse, int first_column, Tensor(a!) dz) -> ()",
    "head_product": "(Tensor a, Tensor b, Tensor(a!) out, Tensor scale, bool added, bool transposed) -> ()",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"qrm_fast::{_name}", _schema)


def not_served(device: str) -> list[str]:
    """Which of them have no kernel for tensors of a device of this type."""
    key = torch._C._dispatch_key_for_device(device)
    return [name for name in SCHEMAS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"qrm_fast::{name}", key)]
