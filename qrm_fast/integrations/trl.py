"""TRL 1.16: its fused head on `linear_logprobs`, a packed forward for GRPO and RLOO, token-level credit for GRPO.

Everything goes through hooks of TRL's that are looked up and compared before they are used; one that has moved raises
with its name. `python -m qrm_fast.integrations.trl check` says which are there and what would run.
"""

import importlib
import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import PackedBatch, doctor, from_padded, linear_logprobs, linear_logprobs_partial
from ..rl.attention import (
    check_packing,
    flash_attn_varlen_func,
    inside_packed_inputs,
    packed_attention,
    packed_inputs,
    without_adapters,
)
from .credit import Answers, Credit, ProcessCredit, QRMCredit

__all__ = ["Answers", "Credit", "PackedForward", "ProcessCredit", "QRMCredit", "TokenCredit", "use_linear_logprobs"]

SUPPORTED = "1.16"
_MULTIMODAL = (
    "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
    "mm_token_type_ids image_position_ids"
)
_LOGPS = f"self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss {_MULTIMODAL}"
_HEAD = "trl.trainer.utils._ChunkedLogProbFunction"
_COMPACT = "trl.trainer.utils._use_triton"
_FUSED_HEAD = "trl.trainer.utils.add_fused_lm_head"
_GRPO, _RLOO = "trl.trainer.grpo_trainer.GRPOTrainer", "trl.trainer.rloo_trainer.RLOOTrainer"
# Every name of TRL's that is replaced, overridden or relied on, with the parameters that it must take.
HOOKS = {
    f"{_HEAD}.forward": "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
    "outputs",
    _COMPACT: "device",
    _FUSED_HEAD: "model temperature cast_lm_head_to_fp32 outputs",
    f"{_GRPO}._get_per_token_logps_and_entropies": _LOGPS,
    f"{_RLOO}._get_per_token_logps_and_entropies": _LOGPS,
    f"{_GRPO}._calculate_rewards": "self inputs prompts completions completion_ids_list",
    f"{_GRPO}._generate_and_score_completions": "self inputs",
    f"{_GRPO}._compute_loss": "self model inputs",
}


class Moved(RuntimeError):
    """A name of TRL's is not where, or not what, this module was written for."""


def find_hook(name: str) -> Any:
    """The object of TRL's at `name`, a key of `HOOKS` or a beginning of one.

    Raises Moved, with the name, where TRL is of another version, has no such name, or takes other parameters there.
    """
    version = importlib.import_module("trl").__version__
    if not version.startswith(f"{SUPPORTED}."):
        raise Moved(f"qrm_fast.integrations.trl is written for trl {SUPPORTED}, got {version}, at {name}")
    module, attributes = ".".join(name.split(".")[:3]), name.split(".")[3:]
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes:
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise Moved(f"{name} of trl {version} has moved: {error}") from None
    if name in HOOKS:
        got = " ".join(inspect.signature(inspect.unwrap(found)).parameters)
        if got != HOOKS[name]:
            raise Moved(f"{name} of trl {version} has changed: expected the parameters ({HOOKS[name]}), got ({got})")
    return found


class use_linear_logprobs:
    """Put `linear_logprobs` into the fused head that TRL's trainers share (GRPO, RLOO, DPO, KTO, SFT, async GRPO).

    The plain call holds for the rest of the process: `use_linear_logprobs()`. As a context, `with
    use_linear_logprobs(): ...`, it ends with it; a backward pass may come later. Trainers that exist already are
    served as well. Results are TRL's to rounding; like TRL on devices with Triton, the head then scores positions with
    a label alone, on every device. Where TRL asks for what `linear_logprobs` does not compute (WPO's weights, the mean
    logit under a softcap, ZeRO-3's partitioned weights) its own head runs, with one warning.

    Raises Moved where TRL's head is not the one that this was written for.
    """

    def __init__(self) -> None:
        self.module = find_hook("trl.trainer.utils")
        if getattr(self.module, "_ChunkedLogProbFunction", None) is not LinearLogprobsHead:  # as in a nested call
            for name in (f"{_HEAD}.forward", _COMPACT, _FUSED_HEAD):
                find_hook(name)
        self.before = (self.module._ChunkedLogProbFunction, self.module._use_triton)
        self.module._ChunkedLogProbFunction, self.module._use_triton = LinearLogprobsHead, _compact_everywhere

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.module._ChunkedLogProbFunction, self.module._use_triton = self.before


def _compact_everywhere(device: torch.device) -> bool:
    return True


class LinearLogprobsHead:
    """What TRL calls in the place of its `ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each, those not in `outputs` None.

        `hidden` [N, D], `weight` [V, D], `bias` [V], `targets` [N]; TRL's logits are cap(scale z) / temperature, which
        is scale cap'(z) / temperature with cap' of softcap / scale.
        """
        why = _not_ours(weight, softcap, outputs)
        if why:
            _warn_once(why, "its own head")
            own = importlib.import_module("trl.kernels").ChunkedLogProbFunction
            return own.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
        if not torch.is_autocast_enabled(hidden.device.type):  # under it the op casts, as F.linear does
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        options: dict[str, Any] = dict(
            bias=bias, temperature=temperature / logit_scale, softcap=softcap and softcap / logit_scale
        )
        logprobs, entropy, _ = linear_logprobs(hidden, weight, targets, **options)
        mean_logits = is_top1 = None
        with torch.no_grad():
            if "mean_logits" in outputs:
                mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
                mean_logits = (mean if bias is None else mean + bias.float().mean()) * (logit_scale / temperature)
            if "is_top1" in outputs:
                part = linear_logprobs_partial(hidden, weight, targets, vocab_start=0, **options)
                is_top1 = part.target_logit >= part.max
        return logprobs, entropy if "entropy" in outputs else None, None, mean_logits, is_top1


def _not_ours(weight: Tensor, softcap: float | None, outputs: tuple[str, ...]) -> str | None:
    if hasattr(weight, "ds_id"):  # released after the forward pass, when autograd would need it
        return "the head's weight is partitioned by ZeRO-3"
    if "log_sum_sq_probs" in outputs:
        return "WPO's weights need the sum of squared probabilities"
    if "mean_logits" in outputs and softcap is not None:
        return "the mean of logits under a softcap is asked for"
    return None


_warned: set[str] = set()


def _warn_once(why: str, what: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"TRL runs {what}: {why}", stacklevel=3)


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

    Current, old and reference log-probabilities come from one forward pass over the real tokens of a micro-batch, no
    padding among them; the head reads the rows that predict a completion token. The model is called as TRL calls it,
    with its wrappers (accelerate, DDP, FSDP, peft) and TRL's own fused head, so that their hooks and gradient
    checkpointing see the call. Results are TRL's to rounding.

    TRL's own path runs, with one warning that says why, for multimodal inputs, the auxiliary loss of a mixture of
    experts, prompt-learning adapters, a mask that is not one run of tokens per row, and a model that fails the leak
    test: at the start packed sequences of up to 512 tokens and the longest completion must give what each gives alone.
    Raises Moved where TRL's hooks are not those that this was written for.
    """

    accelerator: Any
    model: Any
    ref_model: Any
    args: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _check_order(cls, PackedForward, "_get_per_token_logps_and_entropies")

    def __init__(self, *args: Any, **options: Any) -> None:
        for name in (_GRPO, _RLOO):
            find_hook(f"{name}._get_per_token_logps_and_entropies")
        super().__init__(*args, **options)
        self.cannot_pack = _cannot_pack(self.model, PROMPT_TOKENS + self.args.max_completion_length)
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
            _warn_once(why, "its own padded forward")
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

    def _packed(self, model: Any, input_ids: Tensor, mask: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
        """[B, C] twice."""
        is_action = mask.bool()
        is_action[:, :-num_columns] = False
        batch, columns = pack_padded(input_ids, mask, is_action)
        labels = batch.targets.masked_fill(~batch.action_mask, -100)
        with use_linear_logprobs(), self.accelerator.autocast(), packed_inputs(batch) as inputs:
            out = model(**inputs, shift_labels=labels[None], fused_lm_head=True)
        place = batch.seq_ids, columns - (input_ids.shape[1] - num_columns)
        rows = (x[0, batch.action_index] for x in (out.log_probs, _entropy(out)))
        logprobs, entropies = (x.new_zeros(len(input_ids), num_columns).index_put(place, x) for x in rows)
        return logprobs, entropies


def _entropy(out: Any) -> Tensor:
    """A reference model's head gives none."""
    return out.log_probs.detach() if out.entropy is None else out.entropy


def _one_run(mask: Tensor, num_columns: int) -> bool:
    """Whether each row of `mask` [B, P + C] is empty or one run that begins in the first P columns."""
    edges = (mask[:, 1:] != mask[:, :-1]).sum(1)
    whole = (edges <= 2 - mask[:, 0].int()) & mask[:, :-num_columns].any(1)
    return bool((whole | ~mask.any(1)).all())


def pack_padded(input_ids: Tensor, mask: Tensor, is_action: Tensor) -> tuple[PackedBatch, Tensor]:
    """The packed batch of padded rows, and the column [T] of every action.

    `input_ids`: [B, L] int64. `mask`: [B, L], nonzero on tokens. `is_action`: [B, L] bool, tokens that were chosen; the
    first token of a row, which nothing predicts, is none. Waits for the device on CUDA.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    cu_seqlens, ids, chosen = from_padded(mask, input_ids, is_action)
    lengths = cu_seqlens.diff()
    last = cu_seqlens[1:][lengths > 0] - 1
    targets = ids.roll(-1).index_fill(0, last.long(), -100)
    action_mask = chosen.roll(-1).index_fill(0, last.long(), False)
    index = action_mask.nonzero()[:, 0]
    seq_ids = rows[index]
    ends = torch.bincount(seq_ids, minlength=len(mask)).cumsum(0, dtype=torch.int32)
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(len(ids), device=ids.device) - cu_seqlens[rows],
        cu_seqlens=cu_seqlens,
        targets=targets,
        action_mask=action_mask,
        action_index=index,
        action_cu_seqlens=torch.cat([ends.new_zeros(1), ends]),
        seq_ids=seq_ids,
        max_seqlen=int(lengths.max()),
    )
    return batch, columns[index + 1]


def _check_groups(num_answers: int, group_size: int) -> None:
    if num_answers % group_size:
        raise ValueError(f"a process must hold whole groups of {group_size} answers, got {num_answers} answers")


def _check_order(cls: type, mixin: type, method: str) -> None:
    owners = [base for base in cls.__mro__ if method in vars(base)]
    if owners[-1] is mixin:
        raise TypeError(f"{mixin.__name__} must stand before the trainer it extends, got class {cls.__name__}")


def _cannot_pack(model: Any, num_tokens: int) -> str | None:
    """What the leak test has against packing `model`, None where it passes; `model` is left as it was."""
    plain = without_adapters(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in adapters):
        return "an adapter puts virtual tokens before the prompt"
    limit = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
    dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    before = plain.config._attn_implementation
    try:
        for module in dropouts:
            module.p = 0.0
        plain.set_attn_implementation("qrm_packed")
        check_packing(model, min(num_tokens, limit or num_tokens))
    except ValueError as error:
        return str(error)
    finally:
        for module, p in dropouts.items():
            module.p = p
        plain.set_attn_implementation(before)
    return None


class TokenCredit:
    """Mixin before GRPOTrainer: a token's advantage comes from `credit`, in the place of its answer's.

        class Trainer(TokenCredit, PackedForward, GRPOTrainer): ...
        Trainer(..., credit=QRMCredit("path/of/q_rm", tokenizer))

    `credit` is called once per generation, on the packed answers, and returns advantages [T] and metrics, which are
    logged as credit/NAME. They reach TRL's loss as its (B, T) advantages, 0 wherever no action is: padding, truncated
    completions that TRL masks, tool output. TRL's reward statistics and its table of completions stay those of
    `reward_funcs`. With several processes each must hold whole groups.

    Raises TypeError beside a trainer whose loss takes one advantage per answer (RLOO), Moved where TRL's hooks are not
    those that this was written for.
    """

    accelerator: Any
    model: Any
    args: Any
    reward_weights: Tensor
    num_generations: int
    num_generations_eval: int
    _metrics: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _check_order(cls, TokenCredit, "_generate_and_score_completions")

    def __init__(self, *args: Any, credit: Credit, **options: Any) -> None:
        for name in HOOKS:
            if name.startswith(_GRPO):
                find_hook(name)
        if not isinstance(self, find_hook(_GRPO)):
            raise TypeError(f"TokenCredit needs a GRPOTrainer, whose loss takes token advantages, got {type(self)}")
        super().__init__(*args, **options)
        self.credit = credit

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's [S, F]; their weighted sum is kept, NaN where no function scored the answer."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        start = self.accelerator.process_index * len(prompts)
        self._earned = total.masked_fill(rewards.isnan().all(1), torch.nan)[start : start + len(prompts)]
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        completion_mask = out["completion_mask"]
        num_answers, width = completion_mask.shape
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        _check_groups(num_answers, group_size)

        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        mask = torch.cat([out["prompt_mask"], completion_mask], 1)
        is_action = torch.cat([torch.zeros_like(out["prompt_mask"]), out.get("tool_mask", completion_mask)], 1)
        is_action = is_action.bool() & mask.bool()
        step = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        parts = zip(ids.split(step), mask.split(step), is_action.split(step), strict=True)
        batches, columns = zip(*(pack_padded(*part) for part in parts), strict=True)
        lengths = torch.cat([batch.action_cu_seqlens.diff() for batch in batches])
        answers = Answers(
            batches=batches,
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)]),
            group_ids=torch.arange(num_answers, device=ids.device) // group_size,
            rewards=self._earned.to(ids.device),
            advantages=out["advantages"],
        )
        with torch.no_grad():
            advantages, metrics = self.credit(answers)
        row = torch.arange(num_answers, device=ids.device).repeat_interleave(lengths)
        column = torch.cat(columns) - out["prompt_ids"].shape[1]
        out["advantages"] = advantages.new_zeros(num_answers, width).index_put((row, column), advantages)
        for name, value in metrics.items():
            self._metrics[mode][f"credit/{name}"].append(self.accelerator.gather(value).mean().item())
        return out


def check() -> int:
    """Print versions, hooks and what would run; 1 where a hook has moved."""
    versions = {name: doctor.version(name) for name in ("qrm_fast", "trl", "transformers", "torch", "peft")}
    print(", ".join(f"{name} {version or 'absent'}" for name, version in versions.items()), f"(trl {SUPPORTED} needed)")
    moved = 0
    for name in HOOKS:
        try:
            find_hook(name)
            print(f"found  {name}")
        except Moved as error:
            moved = 1
            print(f"moved  {error}")
    own = "flash_attn" if flash_attn_varlen_func is not None else "torch's varlen_attn"
    print(f"packed attention: {own} for 16-bit models on CUDA, SDPA per run of equal lengths elsewhere")
    served = next(row for row in doctor.served() if row.op == "linear_logprobs")
    print(f"head: {served.cpu} on the CPU, {served.cuda or served.fallback} on CUDA")
    return moved


if __name__ == "__main__":
    if sys.argv[1:] != ["check"]:
        sys.exit("usage: python -m qrm_fast.integrations.trl check")
    sys.exit(check())
