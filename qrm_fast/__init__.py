"""Kernels for token-level credit assignment in LLM reinforcement learning."""

from .ops.gae import Advantages, gae
from .ops.linear_logprobs import TokenLogprobs, linear_logprobs  # isort: split

# The imports below are the dispatch order: the reference above serves every device, a compiled kernel overrides it.
from . import _cpu  # noqa: F401  the C++ kernels register themselves for CPU

__all__ = ["Advantages", "TokenLogprobs", "gae", "linear_logprobs"]
