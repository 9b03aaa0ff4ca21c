"""The fold of a vocabulary head's logits in CUDA C++: a step of the ops of heads, not an op that stands for itself.

It has no reference: only csrc/cuda/head_fold.cu serves it, where it is compiled, and qrm_fast/triton/linear_logprobs.py
asks before it calls.
"""

import torch

torch.library.define(
    "qrm_fast::head_fold",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperatures, float? softcap, "
    "Tensor(a!) statistics, Tensor(b!) target_logits, Tensor(c!)? kept, Tensor(d!)? tops, Tensor(e!)? running) -> ()",
)


def has_head_fold(device: torch.device) -> bool:
    """Whether a kernel of head_fold is registered for tensors of this device."""
    key = torch._C._dispatch_key_for_device(device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("qrm_fast::head_fold", key)
