"""What is written so that nothing is lost: models that plain transformers loads, states that prove to be whole."""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerBase

from . import ranks
from .attention import without_adapters

# What an adapter makes of its base: its head, its separator, its reference. Not config.json, beside which transformers
# would look for whole weights.
MODEL_CONFIG = "model_config.json"
KEPT = 2  # the newest, and one to fall back to
ABOUT, CHECKSUMS = "about.json", "checksums.json"


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Save weights (safetensors), config and tokenizer: a directory that plain transformers loads.

    Of a model with an adapter the adapter alone, in a directory that plain peft loads, and the configuration of what it
    makes of its base. Files are written aside and renamed; those of the other kind are removed, or nobody could tell
    which model the directory holds. Of several processes the first writes, and holds the whole model for it. Raises
    FloatingPointError, and writes nothing, where a weight is not finite.
    """
    plain = without_adapters(model)
    check_finite(model.state_dict(), type(plain).__name__)
    weights = {}
    for name, x in model.state_dict().items():
        value = ranks.full(x)
        if ranks.is_first():
            weights[name] = value.cpu() if ranks.num_ranks() > 1 else x
    if ranks.is_first():
        _write_checkpoint(model, plain, weights, tokenizer, Path(directory))
    ranks.barrier()


def _write_checkpoint(
    model: Any, plain: Any, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".saving") as aside:
        if model is plain:
            model.save_pretrained(aside, state_dict=weights)
            others = ["adapter_*", MODEL_CONFIG]
        else:
            model.save_pretrained(aside, state_dict=weights, save_embedding_layers=False)
            plain.config.architectures = [type(plain).__name__]
            plain.config.to_json_file(Path(aside) / MODEL_CONFIG)
            others = ["config.json", "model*.safetensors*"]
        tokenizer.save_pretrained(aside)
        for file in Path(aside).iterdir():
            os.replace(file, directory / file.name)
    for file in (file for pattern in others for file in directory.glob(pattern)):
        file.unlink()


def save_state(directory: Path, about: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Write `parts` as the folder `state-STEP` of torch.distributed.checkpoint, and keep the newest two such folders.

    `about`: what JSON can hold, "step" among it. `parts`: tensors and other leaves in dicts and lists; every process
    writes what it holds, and any number of processes reads it. Written aside, with its checksums, and renamed: a crash
    leaves the states that were there. Raises OSError where the folder cannot be written whole, FloatingPointError where
    a number in `parts` is not finite; what was there stays then.
    """
    step, aside = about["step"], directory / "state.new"
    check_finite(parts, f"the state of step {step}")
    try:
        if ranks.is_first():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        with _quiet():
            dcp.save(dict(parts), checkpoint_id=aside)
        written = sorted(path for path in aside.iterdir() if path.name != CHECKSUMS)
        checksums = _checksums(ranks.share(written))
        if ranks.is_first():
            (aside / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
            _replace(aside, directory / f"state-{step:08d}")
    except (OSError, RuntimeError, CheckpointException) as error:
        if ranks.is_first():
            shutil.rmtree(aside, ignore_errors=True)
        older = ", ".join(path.name for path in states(directory)) or "none"
        raise OSError(
            f"the state of step {step} could not be written to {directory}: {_reason(error)}; kept: {older}"
        ) from error
    if ranks.is_first():
        for path in states(directory)[KEPT:]:
            _replace(path, directory / "state.old")
            shutil.rmtree(directory / "state.old")


def newest_state(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The newest state that is whole, and what `save_state` was told about it. Warns of every newer one that is not.

    Raises FileNotFoundError where there is no state, ValueError where every one is damaged.
    """
    paths = states(directory)
    if not paths:
        raise FileNotFoundError(f"{directory} must hold a state to go on from, state-STEP, got none")
    for path in paths:
        if _is_whole(path):
            return path, json.loads((path / ABOUT).read_text(encoding="utf-8"))
        warnings.warn(f"{path} is damaged: its files are not those of its checksums", stacklevel=2)
    raise ValueError(f"{directory} must hold a whole state, got {len(paths)} damaged: {paths[0].name} is the newest")


def load_state(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The state at `path`, in the form of `parts`, whose tensors are overwritten.

    Raises ValueError where the state has not what `parts` have.
    """
    state = dict(parts)
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(f"{path} must be a state of this run, got {_reason(error)}") from error
    return state


def states(directory: Path) -> list[Path]:
    """Folders of `save_state`, the newest first."""
    return sorted(directory.glob("state-*"), reverse=True)


def _is_whole(path: Path) -> bool:
    """Every process reads its share of the files."""
    try:
        checksums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        mine = ranks.share(sorted(checksums))
        broken = {name: checksums[name] for name in mine} != _own_checksums([path / name for name in mine])
    except (OSError, ValueError, TypeError, LookupError):
        broken = True
    return not any(ranks.gather_objects(broken))


def _checksums(own: list[Path]) -> dict[str, int]:
    """Of the files of all processes, by name."""
    return {name: crc for part in ranks.gather_objects(_own_checksums(own)) for name, crc in part.items()}


def _own_checksums(paths: list[Path]) -> dict[str, int]:
    return {path.name: _checksum(path) for path in paths}


def _replace(path: Path, other: Path) -> None:
    """Rename a folder to the name of another, which goes."""
    shutil.rmtree(other, ignore_errors=True)
    os.replace(path, other)


@contextmanager
def _quiet() -> Iterator[None]:
    """One process needs no group, which torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """What went wrong on the first process that failed."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)


def check_finite(parts: Mapping[str, Any], what: str) -> None:
    """Raise FloatingPointError, naming the first of them, where a tensor holds a number that is not finite."""
    tensors = ((name, ranks.local(x)) for name, x in _tensors(parts, ""))
    broken = next((name for name, x in tensors if x.is_floating_point() and not x.isfinite().all()), None)
    found = [name for name in ranks.gather_objects(broken) if name is not None]
    if found:
        raise FloatingPointError(f"{what} is not saved: {found[0]} is not finite")


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
