"""The folder of one run: whose it is, what it was asked for, and how it stops."""

import fcntl
import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, Literal

from . import ranks
from .checkpoint import load_state, newest_state, save_state, states
from .ranges import CountOrNone, Positive

Dtype = Literal["float32", "bfloat16"]  # of weights and activations; updates are float32
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(kw_only=True)
class RunOptions:
    """What every training is asked."""

    out: str
    """Directory for the checkpoint, metrics.jsonl, options.json and states to resume from."""
    save_every: CountOrNone = 0
    """Steps between states to resume from; 0: only where a signal stops the run."""
    resume: bool = False
    """Go on from the newest state in `out`."""
    overwrite: bool = False
    """Begin anew in a directory that holds a run."""
    seed: CountOrNone = 0
    device: str = "cpu"
    dtype: Dtype = "float32"
    lora_rank: CountOrNone = 0
    """Rank of the adapters (LoRA) that are trained in place of the model's weights; 0: the weights are."""
    lora_alpha: Positive = 32.0
    """An adapter counts lora_alpha / lora_rank."""
    lora_target_modules: str = "all-linear"
    """Layers that get an adapter: every linear one below the head, or names by commas, q_proj,v_proj."""
    tensorboard: bool = False
    """Write TensorBoard event files beside metrics.jsonl."""


class Stopped(Exception):
    """A signal ended a run, which has saved its state."""

    def __init__(self, number: int, step: int, directory: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name} stopped the run after step {step}; its state is in {directory}: go on with resume")
        self.number = number


class RunFolder:
    """`config.out`, locked and listening for signals inside `with`; nothing is written before.

    Of several processes the first locks and writes, and all stop after the same step.

    Raises ValueError for a directory that holds a run where neither resume nor overwrite is asked for, that another run
    writes to, or that the run reads a model from, and FileNotFoundError where there is nothing to resume.
    """

    def __init__(self, config: RunOptions) -> None:
        self.config, self.path = config, Path(config.out)
        self.signal: int | None = None
        if config.resume and config.overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")
        for name in ("model", "tokenizer", "q_rm", "prm", "orm", "implicit"):
            value = getattr(config, name, None)
            if value and Path(value).resolve() == self.path.resolve():
                raise ValueError(f"out must be a directory of its own, got {value}, which is also {name}")
        holds_run = (self.path / "metrics.jsonl").exists() or states(self.path)
        if holds_run and not (config.resume or config.overwrite):
            raise ValueError(f"{self.path} holds a run: resume it, overwrite it, or choose another out")

    def __enter__(self) -> "RunFolder":
        ranks.barrier()  # all have looked at the folder before one writes to it
        if ranks.is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
            self._begin()
        ranks.barrier()
        self.handlers = {}
        if current_thread() is main_thread():  # no other may listen
            self.handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _begin(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise ValueError(f"another run is writing to {self.path}") from None
        if self.config.overwrite:
            for path in (*states(self.path), self.path / "best"):
                shutil.rmtree(path, ignore_errors=True)
        options = {name: x for name, x in asdict(self.config).items() if name not in ("resume", "overwrite")}
        (self.path / "options.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        self._stop_listening()
        if ranks.is_first():
            (self.path / ".lock").unlink(missing_ok=True)
            self.lock.close()

    def load(self, parts: Mapping[str, Any]) -> int:
        """Take `parts` up where the newest state left them, and return its step; 0 for a run that begins.

        Raises ValueError for a state of another configuration.
        """
        if not self.config.resume:
            return 0
        path, about = newest_state(self.path)
        check_resumable(asdict(self.config), about["config"])
        state = load_state(path, {name: part.state_dict() for name, part in parts.items()})
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return about["step"]

    def keep(self, step: int, parts: Mapping[str, Any]) -> None:
        """Save the `state_dict()` of `parts` if that is due after `step`. Raises Stopped, saved, after a signal."""
        every = self.config.save_every
        number = max(ranks.gather_objects(self.signal or 0))
        if number or (every and step % every == 0):
            saved = {name: part.state_dict() for name, part in parts.items()}
            save_state(self.path, {"step": step, "config": asdict(self.config)}, saved)
        if number:
            raise Stopped(number, step, self.path)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._stop_listening()  # a second signal does not wait for the step to end

    def _stop_listening(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


# What a resumed run may change; all else shapes the run that the state belongs to.
RESUMABLE = {"out", "resume", "overwrite", "num_iterations", "max_tokens", "device", "tensorboard"}
RESUMABLE |= {"save_every", "eval_every", "eval_data", "max_skipped", "peak_tflops"}


def check_resumable(config: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ValueError where `config` would go on with another run than the one that `saved` began."""
    for name, value in config.items():
        if name not in RESUMABLE and value != saved[name]:
            raise ValueError(f"{name} must be that of the state, {saved[name]!r}, got {value!r}")
