"""Log-probabilities of GRPO and RLOO from packed rows: no padding in the forward pass, the head on actions alone."""

from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ... import PackedBatch, pack
from ...rl.attention import (
    check_packing,
    inside_packed_inputs,
    packed_attention,
    packed_inputs,
    shares_prompts,
    without_adapters,
)
from .head import use_linear_logprobs, use_linear_policy_loss
from .hooks import GRPO, RLOO, check_order, find_hook, warn_once
from .objective import Objective, policy_objective


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask inside `packed_inputs`, where boundaries take its place; elsewhere one in full, also for plain causal."""
    return None if inside_packed_inputs() else sdpa_mask(*args, **options | dict(allow_is_causal_skip=False))


# `packed_attention` for a model that is called on packed and on padded rows, as a trainer's is.
ATTENTION = "qrm_packed_or_padded"
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _mask)

# Prompts up to here, and the longest completion: what the leak test runs at the start.
PROMPT_TOKENS = 512


class PackedForward:
    """Mixin before GRPOTrainer or RLOOTrainer: log-probabilities from packed rows and `linear_logprobs`.

        class Trainer(PackedForward, GRPOTrainer): ...

    Current, old and reference log-probabilities come from one forward pass over the real tokens of a micro-batch: no
    padding, and a prompt once for all of its answers. The head reads the rows that predict a completion token. The
    model is called as TRL calls it, with its wrappers (accelerate, DDP, FSDP, peft) and TRL's own fused head, so that
    their hooks and gradient checkpointing see the call. Results are TRL's to rounding.

    TRL's own path runs, with one warning that says why, for multimodal inputs, the auxiliary loss of a mixture of
    experts, prompt-learning adapters, a mask that is not one run of tokens per row, and a model that fails the leak
    test: at the start packed sequences of up to 512 tokens and the longest completion must give what each gives alone.
    Raises Moved where TRL's hooks are not those that this was written for.
    """

    accelerator: Any
    model: Any
    ref_model: Any
    args: Any
    _objective: Objective | None = None
    _carried: Tensor | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_order(cls, PackedForward, "_get_per_token_logps_and_entropies")

    def __init__(self, *args: Any, **options: Any) -> None:
        for name in (GRPO, RLOO):
            find_hook(f"{name}._get_per_token_logps_and_entropies")
        find_hook(f"{GRPO}._compute_loss")
        super().__init__(*args, **options)
        self.cannot_pack, self.share_prompts = _packs(self.model, PROMPT_TOKENS + self.args.max_completion_length)
        if self.cannot_pack is None:
            for model in (self.model, self.ref_model):
                if model is not None:
                    without_adapters(self.accelerator.unwrap_model(model)).set_attn_implementation(ATTENTION)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies [B, C] of the last C columns, 0 where the mask is."""
        why = self.cannot_pack
        if any(x is not None for x in multimodal.values()):
            why = "the inputs are multimodal"
        elif compute_aux_loss:
            why = "the auxiliary loss of a mixture of experts is asked for"
        elif why is None and not _one_run(attention_mask.bool(), logits_to_keep):
            why = "a row of the attention mask is not one run of tokens that begins in the prompt"
        if why is not None:
            warn_once(why, "its own padded forward")
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        columns = [x.split(batch_size or len(x)) for x in (input_ids, attention_mask)]
        parts = [self._packed(model, ids, mask, logits_to_keep) for ids, mask in zip(*columns, strict=True)]
        logprobs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropies if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's, value and metrics, with the gradient that `linear_policy_loss` has formed where it can."""
        self._objective, self._carried = None, None
        if torch.is_grad_enabled() and self.cannot_pack is None and isinstance(self, find_hook(GRPO)):
            found = policy_objective(self, inputs)
            if isinstance(found, str):
                warn_once(found, "its own loss")
            else:
                self._objective = found
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        self._objective = None
        return loss if self._carried is None else loss + self._carried

    def _packed(self, model: Any, input_ids: Tensor, mask: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
        """[B, C] twice."""
        batch, row, column = pack_answers(input_ids, mask, num_columns, self.share_prompts)
        labels = batch.targets.masked_fill(~batch.action_mask, -100)
        objective = self._objective if len(batch.action_index) else None
        if objective is None:
            head = use_linear_logprobs()
        else:
            head = use_linear_policy_loss(objective.rows(row, column, batch.action_cu_seqlens))
        with head, self.accelerator.autocast(), packed_inputs(batch) as inputs:
            out = model(**inputs, shift_labels=labels[None], fused_lm_head=True)
        if objective is not None:
            first = out.log_probs[0, batch.action_index[0]]
            self._carried = first - first.detach()
            out.log_probs = out.log_probs.detach()
        rows = (x[0, batch.action_index] for x in (out.log_probs, _entropy(out)))
        logprobs, entropies = (x.new_zeros(len(input_ids), num_columns).index_put((row, column), x) for x in rows)
        return logprobs, entropies


def _entropy(out: Any) -> Tensor:
    """A reference model's head gives none."""
    return out.log_probs.detach() if out.entropy is None else out.entropy


def _one_run(mask: Tensor, num_columns: int) -> bool:
    """Whether each row of `mask` [B, P + C] is empty or one run that begins in the first P columns."""
    edges = (mask[:, 1:] != mask[:, :-1]).sum(1)
    whole = (edges <= 2 - mask[:, 0].int()) & mask[:, :-num_columns].any(1)
    return bool((whole | ~mask.any(1)).all())


def pack_answers(
    input_ids: Tensor, mask: Tensor, num_columns: int, share_prompts: bool
) -> tuple[PackedBatch, Tensor, Tensor]:
    """The packed batch of padded rows, equal prompts side by side; row and completion column of each of its actions.

    `input_ids`, `mask`: [B, P + C] int64, C = `num_columns`; the mask of a row is empty or one run that begins among
    the first P columns. Waits for the device on CUDA.
    """
    ids, keep = input_ids.tolist(), mask.bool().tolist()
    rows = [list(compress(*row)) for row in zip(ids, keep, strict=True)]
    prompt_lens = [sum(row[:-num_columns]) for row in keep]
    order = sorted((b for b in range(len(rows)) if rows[b]), key=lambda b: (rows[b][: prompt_lens[b]], len(rows[b])))
    batch = pack(
        [rows[b] for b in order],
        [prompt_lens[b] for b in order],
        share_prompts=share_prompts,
        device=input_ids.device,
    )
    row = torch.tensor(order, device=input_ids.device)[batch.seq_ids]
    first = torch.tensor(prompt_lens, device=input_ids.device)[row]
    return batch, row, batch.position_ids[batch.action_index] + 1 - first


def _packs(model: Any, num_tokens: int) -> tuple[str | None, bool]:
    """What the leak test has against packing `model`, None where it passes, and whether answers may share a prompt.

    `model` is left as it was.
    """
    plain = without_adapters(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in adapters):
        return "an adapter puts virtual tokens before the prompt", False
    limit = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
    dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    before = plain.config._attn_implementation
    try:
        for module in dropouts:
            module.p = 0.0
        plain.set_attn_implementation("qrm_packed")
        num_tokens = min(num_tokens, limit or num_tokens)
        check_packing(model, num_tokens)
        return None, shares_prompts(model, num_tokens)
    except ValueError as error:
        return str(error), False
    finally:
        for module, p in dropouts.items():
            module.p = p
        plain.set_attn_implementation(before)
