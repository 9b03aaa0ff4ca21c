"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: what is trained in place of a model's weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import PackedBatch, TokenLogprobs
from .attention import backbone, of_transformers, without_adapters
from .policy import Policy
from .run_folder import RunOptions
from .tokenizers import adapter_base, lasting


def adapted(model: PreTrainedModel, spec: str, config: RunOptions) -> Any:
    """`model`, loaded from `spec`, its weights frozen and a new adapter in its layers; as it is where lora_rank is 0.

    The adapter starts as the identity. A scalar head is trained whole. Raises ValueError for a model that the adapter
    could not name as its base (a scratch model, another adapter), a target that is no linear layer below the head, and
    without peft.
    """
    if not config.lora_rank:
        return model
    if spec.startswith("scratch:"):
        raise ValueError(f"lora_rank needs a checkpoint, which the adapter names as its base, got {spec}")
    if adapter_base(spec) is not None:
        raise ValueError(f"lora_rank needs a whole checkpoint, got the adapter {spec}: merge it first, qrm-fast merge")
    head: dict[str, Any] = dict(task_type="CAUSAL_LM")
    if hasattr(model, "score"):
        head = dict(task_type="TOKEN_CLS", modules_to_save=["score"])
    lora = _peft("lora_rank trains an adapter").LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=_targets(model, config.lora_target_modules),
        **head,
    )
    with _quiet(spec):
        wrapped = _peft("").get_peft_model(model, lora).eval()
    lora.base_model_name_or_path = lasting(spec)
    return wrapped


def _targets(model: PreTrainedModel, asked: str) -> list[str]:
    """The linear layers below the head that `asked` names, by the ends of their names."""
    linear = [name for name, x in backbone(model).named_modules() if isinstance(x, nn.Linear | Conv1D)]
    ends = sorted({name.rpartition(".")[2] for name in linear})
    if asked == "all-linear":
        return ends
    targets = [name.strip() for name in asked.split(",")]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(
                f"lora_target_modules must be all-linear or some of {','.join(ends)}, the linear layers of "
                f"{type(model).__name__}, got {target}"
            )
    return targets


def whole_modules(spec: str) -> tuple[str, ...]:
    """Beginnings of the names of weights that the adapter at `spec` holds whole, and its base need not have."""
    names = _peft(f"{spec} is an adapter").PeftConfig.from_pretrained(spec).modules_to_save
    return tuple(f"{name}." for name in names or ())


def merged(model: PreTrainedModel, spec: str) -> PreTrainedModel:
    """`model` with the adapter at `spec` in its weights. Raises ValueError where the adapter lacks weights."""
    peft = _peft(f"{spec} is an adapter")
    try:
        with _quiet(spec):
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            whole: Any = peft.PeftModel.from_pretrained(model, spec, torch_device=str(model.device)).merge_and_unload()
    except ValueError as error:
        if isinstance(error.__cause__, UserWarning):
            raise ValueError(
                f"the adapter {spec} must hold every weight it names, got a part: {error.__cause__}"
            ) from None
        raise
    return whole.requires_grad_(True).eval()


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of `model` with its adapters merged, one by one; `model` stays as it is."""
    plain = without_adapters(model)
    for name, x in plain.state_dict().items():
        path, below, end = name.partition(".base_layer.")
        if below and end == "weight":
            layer = plain.get_submodule(path)
            x = (x + sum(layer.get_delta_weight(adapter).detach() for adapter in layer.active_adapters)).to(x.dtype)
        if ".lora_" not in name:
            yield (f"{path}.{end}" if below else name), x


@contextmanager
def _quiet(spec: str) -> Iterator[None]:
    """What peft has against the adapter of `spec`, and not what transformers has against peft."""
    with of_transformers(spec), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(f"{what}, which needs the package peft, pip install 'qrm_fast[lora]'") from None
    return peft


class Start(NamedTuple):
    """The policy that training began with, without a copy: the same weights, the adapter off."""

    policy: Policy

    def __call__(self, batch: PackedBatch, *, temperature: float = 1.0) -> TokenLogprobs:
        with self.policy.model.disable_adapter():
            return self.policy(batch, temperature=temperature)
