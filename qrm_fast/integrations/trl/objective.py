"""GRPOTrainer's loss as options of `linear_policy_loss`, where the two are the same objective."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rl.attention import without_adapters

_RATIO_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


class Objective(NamedTuple):
    columns: dict[str, Tensor]  # advantages, token_weights, old_logprobs, ref_logprobs: [B, C] float32
    options: dict[str, Any]

    def rows(self, seq_ids: Tensor, places: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
        """The arguments of `linear_policy_loss` for packed actions [T], each of a row and a column."""
        sequences = dict(cu_seqlens=cu_seqlens) if self.options["kind"] == "gspo" else {}
        return {name: x[seq_ids, places] for name, x in self.columns.items()} | self.options | sequences


def policy_objective(trainer: Any, inputs: dict[str, Any]) -> Objective | str:
    """What `trainer._compute_loss(model, inputs)` minimises on one micro-batch, or why it is not one of ours.

    A token's loss of TRL's is one kind of `policy_loss`; how loss_type averages tokens is in their weights.
    """
    head = without_adapters(trainer.accelerator.unwrap_model(trainer.model)).get_output_embeddings()
    if hasattr(head.weight, "ds_id"):  # released after the forward pass, in which the gradients are formed
        return "the head's weight is partitioned by ZeRO-3"
    args, sequence = trainer.args, trainer.importance_sampling_level == "sequence"
    if trainer.top_entropy_quantile < 1:
        return "top_entropy_quantile picks tokens by entropies that the loss has yet to compute"
    if trainer.off_policy_mask_threshold is not None:
        return "off_policy_mask_threshold drops sequences by log-probabilities that the loss has yet to compute"
    if trainer._entropy_bonus_enabled:
        return "the entropy bonus averages tokens in its own way"
    if trainer.loss_type in _RATIO_CLIPPED:
        options: dict[str, Any] = dict(
            clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high, dual_clip=args.delta
        )
        options["kind"] = "gspo" if sequence else "ppo"
        if args.delta is not None and args.delta <= 1 + trainer.epsilon_high:
            return f"delta {args.delta} is below the upper clip 1 + {trainer.epsilon_high}"
    elif trainer.loss_type == "cispo" and trainer.epsilon_high >= 1:
        options = dict(kind="cispo", clip_high=trainer.epsilon_high - 1)  # TRL's is the bound itself
    elif trainer.loss_type == "sapo" and (args.sapo_temperature_neg, args.sapo_temperature_pos) == (1.05, 1.0):
        options = dict(kind="sapo")
    else:
        return f"its {trainer.loss_type} is no kind of policy_loss"

    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    advantages = inputs["advantages"] if inputs["advantages"].ndim == 2 else inputs["advantages"][:, None]
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        advantages = advantages * inputs["importance_sampling_ratio"]
    unbiased = trainer.beta and args.use_bias_correction_kl
    if sequence and (options["kind"] != "gspo" or advantages.shape[1] > 1 or unbiased):
        return "a token of a sequence has its own advantage, bound or KL weight beside the sequence's ratio"

    columns = dict(
        advantages=advantages.float().expand(mask.shape), token_weights=mask * _token_weight(trainer, inputs, mask)
    )
    if inputs.get("old_per_token_logps") is not None:
        columns["old_logprobs"] = inputs["old_per_token_logps"].float()
    if trainer.beta:
        columns["ref_logprobs"] = inputs["ref_per_token_logps"].float()
        options |= dict(kl_coef=trainer.beta, kl_estimator="unbiased" if unbiased else "k3")
    return Objective(columns, options)


def _token_weight(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """Of a token of `mask` [B, C] in the loss of one micro-batch: [] or [B, 1] float32."""
    training, num_answers = trainer.model.training, len(mask)
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type in ("cispo", "dapo"):  # over the answers of the generation batch, on every process
        of_step = accumulation / trainer.args.steps_per_generation if training else 1
        return trainer.accelerator.num_processes / (inputs["num_items_in_batch"].clamp(min=1).float() * of_step)
    tokens = {
        "grpo": num_answers * mask.sum(1, keepdim=True).clamp(min=1),
        "sapo": num_answers * mask.sum(1, keepdim=True).clamp(min=1),
        "bnpo": mask.sum().clamp(min=1),
        "dr_grpo": torch.tensor(num_answers * trainer.max_completion_length, device=mask.device),
        "luspo": torch.tensor(num_answers, device=mask.device),
    }[trainer.loss_type]
    return 1 / (tokens.float() * accumulation)
