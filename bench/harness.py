"""Times ways to compute one result side by side, beside what the machine's libraries do, measured in the same run.

A suite is a file bench_X.py whose functions, decorated with @case, each build the inputs and return a Case. The harness
then refuses a result whose gate is red; runs all providers and baselines in turn, with a cold cache, so that drift hits
all alike; and takes CPU times only while other processes leave the CPU alone.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

Provider = Callable[[], object]


@dataclass
class Case:
    """One result and the ways to it. Every provider is a function without arguments over inputs built beforehand."""

    providers: dict[str, Provider]  # ours first
    gate: Callable[[], None]  # raises AssertionError where our result is wrong at this very shape
    baseline: dict[str, Provider]  # a copy of as many bytes, or the GEMM of every library: the fastest is 100 %
    num_baselines: float = 1.0  # how many of them this result needs: 4 for a 4-GEMM forward + backward
    bytes: int = 0  # the least traffic: every input read once, every output written once
    flops: int = 0  # the least arithmetic
    error: Callable[[str, object], float] | None = None  # of a provider's result: its distance from float64's
    details: Callable[[str, float], dict[str, float]] | None = None  # of a way and its ms: more columns of its row
    machine: Callable[[], dict[str, float]] | None = None  # what the machine does at most, measured beside
    shares: Callable[[], dict[str, float]] | None = None  # of our time: what each part takes
    absent: dict[str, str] = field(default_factory=dict)  # rivals that are not installed: why
    repeats: int = 15  # fewer where a call takes many seconds


# A process started so keeps what it frees (glibc): only its first call waits for fresh pages.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


class Registered(NamedTuple):
    suite: str
    device: str
    build: Callable[[], Case]
    environment: dict[str, str] | None = None  # that a process must have been started with


CASES: dict[str, Registered] = {}


def case(environment: dict[str, str] | None = None, **shapes: list[dict]):
    """Register a function that builds a Case, once per device and shape: `@case(cpu=[{"num_tokens": 4096}])`.

    It is called as `build(device, **shape)`, in a process of its own where it needs an environment.
    """

    def register(build):
        for device, grid in shapes.items():
            for shape in grid:
                name = f"{build.__name__}[{', '.join(f'{k}={v}' for k, v in shape.items())}] {device}"
                suite = build.__module__.rpartition("bench_")[2]
                run = partial(build, torch.device(device), **shape)
                CASES[name] = Registered(suite, device, run, environment)
        return build

    return register


def copy(num_bytes: int, device: torch.device) -> dict[str, Provider]:
    """The baseline of a result bound by memory: a copy that reads and writes `num_bytes` in all."""
    source = torch.ones(num_bytes // 8, device=device)
    target = torch.empty_like(source)
    return {"copy of the same bytes": lambda: target.copy_(source)}


def gemm(a: Tensor, b: Tensor) -> dict[str, Provider]:
    """The baseline of a result bound by arithmetic: a [M, K] @ b[N, K].T by every library that PyTorch offers here."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype, device=a.device)
    ways: dict[str, Provider] = {"library GEMM: torch.mm": lambda: torch.mm(a, b.T, out=out)}
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways["library GEMM: oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return ways


@dataclass
class Timing:
    """Milliseconds of each clean repeat."""

    ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        p20, _, _, p80 = quantiles(self.ms, n=5, method="inclusive")
        return {"median_ms": median(self.ms), "p20_ms": p20, "p80_ms": p80, "repeats": len(self.ms)}


class Busy(Exception):
    """Other processes used the CPU for too much of the time that was allowed."""


class OtherCpu:
    """The share of this machine's CPU time that other processes took since the last call."""

    def __init__(self) -> None:
        self.last = self._now()

    def _now(self) -> tuple[float, float, float]:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()

    def __call__(self) -> float:
        now = self._now()
        wall, all_cpu, own_cpu = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        return max(0.0, all_cpu - own_cpu) / (wall * len(os.sched_getaffinity(0)))


def interleaved(
    providers: dict[str, Provider],
    device: torch.device,
    *,
    repeats: int = 15,
    max_seconds: float = 90.0,
    allow_busy: bool = False,
) -> tuple[dict[str, Timing], float]:
    """Time each provider `repeats` times in turn; returns the times and the share of CPU time others took meanwhile.

    Each has been called before. Every call finds the cache emptied. Rounds are kept or dropped together in windows of
    at least a quarter of a second, the resolution of the kernel's CPU accounting; a window in which others took over a
    tenth is dropped unless `allow_busy`. Raises Busy when `max_seconds` pass first.
    """
    timings = {name: Timing() for name in providers}
    names, flush = list(providers), torch.empty(flush_bytes(device), dtype=torch.uint8, device=device)
    other_cpu = OtherCpu() if device.type == "cpu" else lambda: 0.0
    shares, start = [], time.perf_counter()
    while min(len(t.ms) for t in timings.values()) < repeats:
        window: dict[str, list[float]] = {name: [] for name in names}
        window_start = time.perf_counter()
        while time.perf_counter() - window_start < 0.25:
            for name in names:
                window[name].append(milliseconds(providers[name], flush))
            names.append(names.pop(0))  # nobody always follows the same neighbour
        share = other_cpu()
        if allow_busy or share <= 0.1:
            shares.append(share)
            for name in names:
                timings[name].ms += window[name]
        elif time.perf_counter() - start > max_seconds:
            raise Busy(f"other processes took {share:.0%} of the CPU; kept {len(timings[names[0]].ms)} of {repeats}")
    return timings, sum(shares) / len(shares)


def flush_bytes(device: torch.device) -> int:
    """Enough to displace the last level of cache and, on CUDA, to keep the device busy while the host launches."""
    if device.type == "cuda":
        return 1 << 30
    sizes = [p.read_text() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return 2 * max([int(s.rstrip("K\n")) * 1024 for s in sizes], default=32 << 20)


def milliseconds(provider: Provider, flush: Tensor) -> float:
    """One call with a cold cache. CUDA events bracket the device's work."""
    flush.zero_()
    if flush.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        provider()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    provider()
    return 1e3 * (time.perf_counter() - begin)


def extra_mib(name: str, way: str, provider: Provider) -> float:
    """MiB that a call needs beyond its inputs, at its peak: of CUDA's allocations, or of a fresh process's memory."""
    if CASES[name].device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, "-m", "bench", "--memory", name, way]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def extra_mib_here(name: str, way: str) -> float:
    """What the first call in this fresh process adds to its high-water mark."""
    for provider in gemm(torch.ones(256, 256), torch.ones(256, 256)).values():
        provider()  # the libraries' own buffers are nobody's memory
    built = CASES[name].build()
    ctypes.CDLL(None).malloc_trim(0)
    # ru_maxrss would not do: a child starts with its parent's, and it cannot be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    built.providers[way]()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def measure(name: str, *, allow_busy: bool = False) -> dict:
    """Run one case; returns its record, which holds `refused` and no figures where our way is wrong or raises.

    A rival that raises is absent from it, with what it said. Raises Busy when the CPU is, so that the last record on a
    quiet one stays.
    """
    suite, device, build, environment = CASES[name]
    if environment and environment.items() - os.environ.items():
        return measured_apart(name, environment, allow_busy)
    record: dict = {"case": name, "suite": suite, "device": device}
    try:
        return record | _figures(name, build(), allow_busy)
    except AssertionError as error:
        return record | {"refused": f"the result is wrong: {error}"}
    except Busy:
        raise
    except Exception as error:  # the next case may do better
        return record | {"refused": _sentence(error)}


def _figures(name: str, built: Case, allow_busy: bool) -> dict:
    built.gate()
    ours, *rivals = built.providers
    built.providers[ours]()
    providers, absent = {ours: built.providers[ours]}, dict(built.absent)
    for way in rivals:
        try:
            built.providers[way]()
            providers[way] = built.providers[way]
        except Exception as error:  # a rival takes no other figure with it
            absent[way] = _sentence(error)
    for provider in built.baseline.values():
        provider()
    ways = providers | built.baseline
    timings, other = interleaved(ways, torch.device(CASES[name].device), repeats=built.repeats, allow_busy=allow_busy)
    times = {way: timing.summary() for way, timing in timings.items()}
    baseline_ms = built.num_baselines * min(times[way]["median_ms"] for way in built.baseline)
    for way, row in times.items():
        result, worth = way in providers, 1.0 if way in providers else built.num_baselines
        row["of_baseline"] = baseline_ms / worth / row["median_ms"]
        if result or not built.flops:
            row["gb_per_s"] = built.bytes / worth / row["median_ms"] / 1e6
        if built.flops:
            row["gflop_per_s"] = built.flops / worth / row["median_ms"] / 1e6
        if result:
            row["extra_mib"] = extra_mib(name, way, providers[way])
            if built.details:
                row["details"] = built.details(way, row["median_ms"])
            if built.error:
                try:
                    row["error"] = built.error(way, providers[way]())
                except Exception as error:  # nor does its error
                    absent[f"error of {way}"] = _sentence(error)
    figures = {"bytes": built.bytes, "flops": built.flops, "other_cpu": other, "times": times}
    if built.machine:
        figures["machine"] = built.machine()
    if built.shares:
        figures["shares"] = built.shares()
    return figures | ({"absent": absent} if absent else {})


def measured_apart(name: str, environment: dict[str, str], allow_busy: bool) -> dict:
    """`measure` in a fresh process with this environment."""
    command = [sys.executable, "-m", "bench", "--measure", name, *(["--busy"] if allow_busy else [])]
    folder, environment = Path(__file__).parent.parent, os.environ | environment
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    if "busy" in record:
        raise Busy(record["busy"])
    return record


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
