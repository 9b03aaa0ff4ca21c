"""The names of TRL's that are replaced, overridden or relied on: looked up, and compared before they are used."""

import importlib
import inspect
import warnings
from typing import Any

SUPPORTED = "1.16"
_MULTIMODAL = (
    "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
    "mm_token_type_ids image_position_ids"
)
_LOGPS = f"self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss {_MULTIMODAL}"
HEAD = "trl.trainer.utils._ChunkedLogProbFunction"
COMPACT = "trl.trainer.utils._use_triton"
FUSED_HEAD = "trl.trainer.utils.add_fused_lm_head"
GRPO, RLOO = "trl.trainer.grpo_trainer.GRPOTrainer", "trl.trainer.rloo_trainer.RLOOTrainer"
# Every name of TRL's that is replaced, overridden or relied on, with the parameters that it must take.
HOOKS = {
    f"{HEAD}.forward": "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
    "outputs",
    COMPACT: "device",
    FUSED_HEAD: "model temperature cast_lm_head_to_fp32 outputs",
    f"{GRPO}._get_per_token_logps_and_entropies": _LOGPS,
    f"{RLOO}._get_per_token_logps_and_entropies": _LOGPS,
    f"{GRPO}._calculate_rewards": "self inputs prompts completions completion_ids_list",
    f"{GRPO}._generate_and_score_completions": "self inputs",
    f"{GRPO}._compute_loss": "self model inputs",
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


warned: set[str] = set()


def warn_once(why: str, what: str) -> None:
    if why not in warned:
        warned.add(why)
        warnings.warn(f"TRL runs {what}: {why}", stacklevel=3)


def check_order(cls: type, mixin: type, method: str) -> None:
    owners = [base for base in cls.__mro__ if method in vars(base)]
    if owners[-1] is mixin:
        raise TypeError(f"{mixin.__name__} must stand before the trainer it extends, got class {cls.__name__}")
