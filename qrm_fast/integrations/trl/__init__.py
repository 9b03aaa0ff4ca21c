"""TRL 1.16: its fused head on `linear_logprobs`, a packed forward for GRPO and RLOO, token-level credit for GRPO.

Everything goes through hooks of TRL's that are looked up and compared before they are used; one that has moved raises
with its name. `python -m qrm_fast.integrations.trl check` says which are there and what would run.
"""

from ..credit import Answers, Credit, ProcessCredit, QRMCredit
from .head import use_linear_logprobs
from .packed_forward import PackedForward
from .token_credit import TokenCredit

__all__ = ["Answers", "Credit", "PackedForward", "ProcessCredit", "QRMCredit", "TokenCredit", "use_linear_logprobs"]
