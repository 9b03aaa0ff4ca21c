"""What a training run writes down: one JSON object per step, TensorBoard scalars on request, seconds per phase."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ranks


class MetricsLog:
    """Writes `directory`/metrics.jsonl, and TensorBoard event files beside it where `tensorboard` is True.

    Rows of an earlier run in the same file are kept up to `first_step`, where a resumed run goes on. Of several
    processes the first writes; the others keep the rows that they are given.
    """

    def __init__(self, directory: str | Path, *, first_step: int = 0, tensorboard: bool = False) -> None:
        self.rows: list[dict[str, float]] = []
        self.writer = None
        if not ranks.is_first():
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = first_step and self.path.exists()
        earlier = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if kept else []
        whole = [json.loads(line) for line in earlier if line.endswith("\n")]  # the last may have been cut off
        self.rows = [row for row in whole if row["step"] < first_step]
        self.path.write_text("".join(map(_line, self.rows)), encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=first_step)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        if not ranks.is_first():
            return
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

    def __init__(self, device: torch.device, *, peak_tflops: float = 0.0) -> None:
        self.cuda, self.peak_tflops = device.type == "cuda", peak_tflops
        self.spans: dict[str, list] = defaultdict(list)
        self.num_tokens: dict[str, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans[name].append((start, self._now()))

    def count(self, name: str, num_tokens: int, flops: float = 0.0) -> None:
        self.num_tokens[name] += num_tokens
        self.flops[name] += flops

    def report(self) -> dict[str, float]:
        """`time/PHASE_s`, and where counted `perf/PHASE_tokens_per_s` and `_tflops_per_s`; then starts afresh.

        Of several processes: the seconds of the slowest, the tokens of all, the FLOPs of one on average. `_mfu` is the
        share of these in `peak_tflops`, where that is known.
        """
        if self.cuda:
            torch.cuda.synchronize()
        own = []
        for name, spans in self.spans.items():
            seconds = sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in spans)
            own.append((seconds, self.num_tokens[name], self.flops[name]))
        everyone = ranks.gather(torch.tensor(own, dtype=torch.float64))  # [N, phases, 3]
        values = {}
        slowest, num_tokens = everyone[..., 0].amax(0).tolist(), everyone[..., 1].sum(0).tolist()
        tflops = (everyone[..., 2].mean(0) / 1e12).tolist()
        for name, s, n, x in zip(self.spans, slowest, num_tokens, tflops, strict=True):
            values[f"time/{name}_s"] = s
            if n:
                values[f"perf/{name}_tokens_per_s"] = n / s
            if x:
                values[f"perf/{name}_tflops_per_s"] = x / s
            if x and self.peak_tflops:
                values[f"perf/{name}_mfu"] = x / s / self.peak_tflops
        self.spans.clear()
        self.num_tokens.clear()
        self.flops.clear()
        return values

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
