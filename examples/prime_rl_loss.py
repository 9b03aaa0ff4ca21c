"""prime-rl: a custom loss, called once per sequence with tensors [seq].

[trainer.loss]
type = "custom"
import_path = "prime_rl_loss.qrm_loss"

[trainer.loss.kwargs]
kind = "cispo"
clip_high = 4.0
"""

import torch
from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

from qrm_fast import policy_loss


def qrm_loss(inputs: LossInputs, **options) -> LossOutputs:
    """The sum over the sequence, as prime-rl's losses: the trainer divides. `options` are those of `policy_loss`."""
    weights = inputs.loss_mask.float()
    if inputs.loss_weights is not None:
        weights = weights * inputs.loss_weights
    if options.get("kind") == "gspo":
        options["cu_seqlens"] = torch.tensor([0, len(weights)], device=weights.device)
    out = policy_loss(
        inputs.trainer_logprobs,
        inputs.advantages.float(),
        old_logprobs=inputs.inference_logprobs.to(inputs.trainer_logprobs.dtype),
        ref_logprobs=inputs.ref_logprobs,
        token_weights=weights,
        **options,
    )
    count = weights.sum().clamp(min=1e-8)
    return LossOutputs(loss=out.loss, metrics={k: getattr(out.metrics, k) / count for k in ("approx_kl", "clip_high")})
