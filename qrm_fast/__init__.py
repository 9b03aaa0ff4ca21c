"""Kernels for token-level credit assignment in LLM reinforcement learning."""

from importlib.util import find_spec

import torch

from . import doctor
from .ops.clip_delta import clip_delta
from .ops.discounted_returns import discounted_returns
from .ops.gae import Advantages, gae
from .ops.gather_logprobs import gather_logprobs
from .ops.group_advantages import group_advantages
from .ops.hopper import not_served
from .ops.implicit_rewards import implicit_rewards
from .ops.informative_groups import informative_groups
from .ops.linear_logprobs import TokenLogprobs, linear_logprobs
from .ops.linear_logprobs_partial import LogprobsPartial, linear_logprobs_partial
from .ops.linear_policy_loss import linear_policy_loss
from .ops.linear_q_values import QValues, linear_q_values
from .ops.linear_sample import SampledTokens, linear_sample
from .ops.loss_weights import loss_weights
from .ops.merge_logprobs import merge_logprobs
from .ops.min_form_returns import MinForm, min_form_returns
from .ops.min_gae import min_gae
from .ops.pairwise_q_loss import PairLoss, pairwise_q_loss
from .ops.policy_loss import PolicyLoss, PolicyMetrics, policy_loss
from .ops.prm_rewards import prm_rewards
from .ops.process_advantages import process_advantages
from .ops.process_diagnostics import ProcessDiagnostics, process_diagnostics
from .ops.progress_rewards import progress_rewards
from .ops.q_advantages import q_advantages
from .ops.q_head_advantages import q_head_advantages
from .ops.q_token_rewards import q_token_rewards
from .ops.scans import SCANS, refuse_scans_on_cuda
from .ops.token_q import token_q
from .ops.value_loss import value_loss
from .ops.vtrace import VTrace, vtrace
from .ops.whiten import whiten  # isort: split

# The imports below are the dispatch order: the reference above serves every device, a compiled kernel overrides it.
try:
    from . import _cpu, _host  # type: ignore[attr-defined]  # noqa: F401  the C++ kernels register themselves for CPU

    _has_cuda_kernels = find_spec(f"{__name__}._cuda") is not None  # built where torch has CUDA and nvcc is installed
    if _has_cuda_kernels:
        from . import _cuda  # type: ignore[attr-defined]  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the compiled extensions of qrm_fast are missing or were built for another Python or torch; "
        f"{doctor.REBUILD} ({error})"
    ) from error

if torch.version.cuda:
    from . import triton as _triton  # noqa: F401  its files register themselves for CUDA

    if not _has_cuda_kernels:
        refuse_scans_on_cuda(doctor.add_nvcc())

from .packing import PackedBatch, from_padded, pack, per_token, plan_microbatches, to_padded, unpack

_served = doctor.served()
_lacking = [row.op for row in _served if row.cpu is None]
if _has_cuda_kernels:
    _lacking += [f"{row.op} for CUDA" for row in _served if row.cuda is None and row.op in SCANS]
    _lacking += [f"{name} for CUDA" for name in not_served("cuda")]
if _lacking:  # their references would take over in silence
    raise ImportError(
        "the compiled extensions of qrm_fast are older than its sources: they lack kernels of "
        f"{', '.join(_lacking)}; {doctor.REBUILD}"
    )

__all__ = [
    "Advantages",
    "LogprobsPartial",
    "MinForm",
    "PackedBatch",
    "PairLoss",
    "PolicyLoss",
    "PolicyMetrics",
    "ProcessDiagnostics",
    "QValues",
    "SampledTokens",
    "TokenLogprobs",
    "VTrace",
    "clip_delta",
    "discounted_returns",
    "from_padded",
    "gae",
    "gather_logprobs",
    "group_advantages",
    "implicit_rewards",
    "informative_groups",
    "linear_logprobs",
    "linear_logprobs_partial",
    "linear_policy_loss",
    "linear_q_values",
    "linear_sample",
    "loss_weights",
    "merge_logprobs",
    "min_form_returns",
    "min_gae",
    "pack",
    "pairwise_q_loss",
    "per_token",
    "plan_microbatches",
    "policy_loss",
    "prm_rewards",
    "process_advantages",
    "process_diagnostics",
    "progress_rewards",
    "q_advantages",
    "q_head_advantages",
    "q_token_rewards",
    "to_padded",
    "token_q",
    "unpack",
    "value_loss",
    "vtrace",
    "whiten",
]
