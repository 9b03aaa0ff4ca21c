"""Steps of an optimiser over batches that are known beforehand: what fine-tuning and reward training share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .metrics import MetricsLog, Phases
from .optimizer import AdamW, trapezoid
from .ranges import Count, CountOrNone, NonNegative, Positive, Share
from .run_folder import RunFolder, RunOptions

Batch = TypeVar("Batch")


@dataclass(kw_only=True)
class StepOptions(RunOptions):
    """What every training on given texts is asked."""

    batch_size: Count = 64
    """Rows of data per optimiser step."""
    lr: NonNegative = 1e-5
    """Peak learning rate."""
    warmup_steps: CountOrNone = 0
    """Steps over which the learning rate rises."""
    decay: Share = 0.0
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_len: Count = 1024
    """Longest sequence in tokens: responses are cut from the right."""
    max_tokens: Count = 8192
    """Packed tokens per micro-batch."""


def learning_rates(config: StepOptions, peak: float, num_steps: int) -> list[float]:
    """Of every step: up to `peak` and down again, as `config` says."""
    warmup, decay = config.warmup_steps, config.decay
    return [peak * trapezoid(i, num_steps, warmup=warmup, decay=decay) for i in range(num_steps)]


def take_steps(
    config: StepOptions,
    folder: RunFolder,
    name: str,
    optimizer: AdamW,
    batches: Sequence[Batch],
    backward: Callable[[Batch], Mapping[str, Tensor]],
    num_tokens: Callable[[Batch], int],
    lrs: Sequence[float] = (),
) -> MetricsLog:
    """One step per batch, from the state that a resumed run goes on from. Returns the log, one row per step.

    `lrs` are the learning rates of the steps, by default those of `learning_rates`. `backward` adds a batch's gradients
    and returns 0-d tensors to report, "loss" among them; metrics are called `name`/loss and so on. Raises
    FloatingPointError before a step that is not finite.
    """
    lrs = lrs or learning_rates(config, config.lr, len(batches))
    first = folder.load({"optimizer": optimizer})
    log = MetricsLog(config.out, first_step=first, tensorboard=config.tensorboard)
    phases = Phases(torch.device(config.device))
    for i in range(first, len(batches)):
        with phases("update"):
            stats = dict(backward(batches[i]))
            stats["grad_norm"] = optimizer.step(lrs[i], config.max_grad_norm)
        phases.count("update", num_tokens(batches[i]))
        values = dict(zip(stats, torch.stack(list(stats.values())).tolist(), strict=True))
        if not math.isfinite(values["grad_norm"]):
            raise FloatingPointError(
                f"step {i} gave a gradient that is not finite (loss {values['loss']}): the model is as it was before "
                "that step, and nothing is saved"
            )
        log(i, {f"{name}/{key}": x for key, x in (values | {"lr": lrs[i]}).items()} | phases.report())
        folder.keep(i + 1, {"optimizer": optimizer})
    return log


def tokens_per_s(log: MetricsLog) -> float:
    """Of all the steps of a log of `take_steps`."""
    seconds = [row["time/update_s"] for row in log.rows]
    tokens = [row["perf/update_tokens_per_s"] * s for row, s in zip(log.rows, seconds, strict=True)]
    return sum(tokens) / sum(seconds)
