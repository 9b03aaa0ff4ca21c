"""What a training run writes down: one JSON object per step, TensorBoard scalars on request, seconds per phase."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


class MetricsLog:
    """Writes `directory`/metrics.jsonl, and TensorBoard event files beside it where `tensorboard` is True.

    Rows of an earlier run in the same file are kept up to `first_step`, where a resumed run goes on.
    """

    def __init__(self, directory: str | Path, *, first_step: int = 0, tensorboard: bool = False) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = first_step and self.path.exists()
        earlier = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if kept else []
        whole = [json.loads(line) for line in earlier if line.endswith("\n")]  # the last may have been cut off
        self.rows: list[dict[str, float]] = [row for row in whole if row["step"] < first_step]
        self.path.write_text("".join(map(_line, self.rows)), encoding="utf-8")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=first_step)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(_line(row))
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def _line(row: Mapping[str, float | None]) -> str:
    """Strict JSON has no NaN and no infinity: they become null."""
    finite = {name: x if x is not None and math.isfinite(x) else None for name, x in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class Phases:
    """Seconds and tokens of each named phase of a step.

    On CUDA a phase is timed by events, which are read in `report`: nothing waits for the device inside the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list] = defaultdict(list)
        self.num_tokens: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans[name].append((start, self._now()))

    def count(self, name: str, num_tokens: int) -> None:
        self.num_tokens[name] += num_tokens

    def report(self) -> dict[str, float]:
        """`time/PHASE_s` and, where tokens were counted, `perf/PHASE_tokens_per_s`; then starts afresh."""
        if self.cuda:
            torch.cuda.synchronize()
        values = {}
        for name, spans in self.spans.items():
            seconds = sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in spans)
            values[f"time/{name}_s"] = seconds
            if name in self.num_tokens:
                values[f"perf/{name}_tokens_per_s"] = self.num_tokens[name] / seconds
        self.spans.clear()
        self.num_tokens.clear()
        return values

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
