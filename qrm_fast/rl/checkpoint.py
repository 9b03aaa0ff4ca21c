"""What is written so that nothing is lost: models that plain transformers loads, states that prove to be whole."""

import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .attention import without_adapters

# What an adapter makes of its base: its head, its separator, its reference. Not config.json, beside which transformers
# would look for whole weights.
MODEL_CONFIG = "model_config.json"
KEPT = 2  # the newest, and one to fall back to


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Save weights (safetensors), config and tokenizer: a directory that plain transformers loads.

    Of a model with an adapter the adapter alone, in a directory that plain peft loads, and the configuration of what it
    makes of its base. Files are written aside and renamed; those of the other kind are removed, or nobody could tell
    which model the directory holds. Raises FloatingPointError, and writes nothing, where a weight is not finite.
    """
    plain = without_adapters(model)
    check_finite(model.state_dict(), type(plain).__name__)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".saving") as aside:
        if model is plain:
            model.save_pretrained(aside)
            others = ["adapter_*", MODEL_CONFIG]
        else:
            model.save_pretrained(aside, save_embedding_layers=False)
            plain.config.architectures = [type(plain).__name__]
            plain.config.to_json_file(Path(aside) / MODEL_CONFIG)
            others = ["config.json", "model*.safetensors*"]
        tokenizer.save_pretrained(aside)
        for file in Path(aside).iterdir():
            os.replace(file, directory / file.name)
    for file in (file for pattern in others for file in directory.glob(pattern)):
        file.unlink()


def save_state(directory: Path, step: int, parts: Mapping[str, Any]) -> None:
    """Write `parts` as `state-STEP-CHECKSUM.pt` and keep the newest two such files.

    A crash leaves the files that were there. Raises OSError where the file cannot be written whole, FloatingPointError
    where a number in `parts` is not finite; what was there stays then.
    """
    check_finite(parts, f"the state of step {step}")
    aside = directory / "state.new"
    try:
        torch.save(dict(parts), aside)
        os.replace(aside, directory / f"state-{step:08d}-{_checksum(aside):08x}.pt")
    except (OSError, RuntimeError) as error:  # torch raises the second where a disk is full
        aside.unlink(missing_ok=True)
        older = ", ".join(path.name for path in states(directory)) or "none"
        raise OSError(
            f"the state of step {step} could not be written to {directory}: {error}; kept: {older}"
        ) from error
    for path in states(directory)[KEPT:]:
        path.unlink()


def load_state(directory: Path) -> dict[str, Any]:
    """The newest state that is whole, on CPU. Warns of every newer one that is damaged.

    Raises FileNotFoundError where there is no state, ValueError where every one is damaged.
    """
    paths = states(directory)
    if not paths:
        raise FileNotFoundError(f"{directory} must hold a state to go on from, state-STEP-CHECKSUM.pt, got none")
    for path in paths:
        if f"{_checksum(path):08x}" == path.stem.rpartition("-")[2]:
            return torch.load(path, map_location="cpu")
        warnings.warn(f"{path} is damaged: its checksum is not the one in its name", stacklevel=2)
    raise ValueError(f"{directory} must hold a whole state, got {len(paths)} damaged: {paths[0].name} is the newest")


def states(directory: Path) -> list[Path]:
    """Files of `save_state`, the newest first."""
    return sorted(directory.glob("state-*-*.pt"), reverse=True)


def check_finite(parts: Mapping[str, Any], what: str) -> None:
    """Raise FloatingPointError, naming the first of them, where a tensor holds a number that is not finite."""
    for name, x in _tensors(parts, ""):
        if x.is_floating_point() and not x.isfinite().all():
            raise FloatingPointError(f"{what} is not saved: {name} is not finite")


def _tensors(x: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, Mapping | list | tuple):
        items = x.items() if isinstance(x, Mapping) else enumerate(x)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc
