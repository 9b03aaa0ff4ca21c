"""Pictures drawn from a file of results: what bounds an op, the ways beside it, how it grows, how exact it is."""

import re
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from docs.figure import save

from .bench_heads import CONTRACT
from .growth import fixed, shape, sweeps
from .render import is_rival, summary
from .shares import LIBRARIES, REST, of_ours

WHOSE = {  # the beginning of a way's name: how its marks look
    "qrm_fast": {"color": "C0", "marker": "o"},
    "trl": {"color": "C1", "marker": "s"},
    "verl": {"color": "C2", "marker": "^"},
    "liger-kernel": {"color": "C3", "marker": "D"},
    "torchrl": {"color": "C4", "marker": "v"},
    "openrlhf": {"color": "C5", "marker": "P"},
    "cut-cross-entropy": {"color": "C6", "marker": "X"},
    "quack-kernels": {"color": "C8", "marker": "h"},
    "rl-triton": {"color": "C9", "marker": "<"},
    "PyTorch": {"color": "0.45", "marker": "x"},
    "copy into fresh memory": {"color": "0.45", "marker": "|"},
}
KEPT = "_in_kept_memory"  # the same case in a process that keeps what it frees


def draw(kind: str, results: Path, records: list[dict], folder: Path) -> Path | None:
    """Write KIND-RESULTS.svg for a file of results; None where it holds nothing to draw."""
    shows, drawn = KINDS[kind]
    shown = [record for record in records if "times" in record and shows(record)]
    figure = drawn(shown) if shown else None
    if figure is None:
        return None
    figure.supxlabel(f"bench/results/{results.name}: {summary(shown)}", fontsize=6.5, x=0.005, ha="left", color="0.3")
    return save(figure, f"{kind}-{results.stem}", folder)


def whose(way: str) -> str:
    return next((name for name in WHOSE if way.startswith(name)), "PyTorch")


def label(record: dict) -> str:
    """The op and its shape, short enough for an axis."""
    op, sizes = shape(record["case"])
    op = op.removesuffix("_forward").replace("_forward_backward", " + gradients")
    letters = {
        "num_tokens": "T",
        "num_rows": "T",
        "dim": "D",
        "vocab": "V",
        "num_sequences": "S",
        "policy_dim": "Dp",
        "q_dim": "Dq",
    }
    numbers = (f"{letters.get(key, key)}={value}" if value.isdigit() else value for key, value in sizes.items())
    return f"{op}  {', '.join(numbers)}"


def ours(record: dict) -> dict:
    return next(iter(record["times"].values()))


def results_of(record: dict) -> dict[str, dict]:
    """Every way to the result, without baselines."""
    return {way: row for way, row in record["times"].items() if "extra_mib" in row}


def by_label(axes: Axes, records: list[dict], value: Callable[[dict, dict], float | None]) -> None:
    """A line per record with a mark per way, ours on top."""
    for i, record in enumerate(records):
        for way, row in reversed(results_of(record).items()):
            if value(record, row):
                axes.plot(value(record, row), i, linestyle="", markersize=5, clip_on=False, **WHOSE[whose(way)])
    axes.set(xscale="log", ylim=(len(records) - 0.5, -0.5), yticks=range(len(records)))
    axes.set_yticklabels(map(label, records), fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def legend(figure: Figure, records: list[dict]) -> None:
    present = {whose(way) for record in records for way in results_of(record)}
    marks = [
        Line2D([], [], linestyle="", markersize=5, label=name, **look)
        for name, look in WHOSE.items()
        if name in present
    ]
    figure.legend(handles=marks, fontsize=8, frameon=False, loc="outside upper center", ncols=len(marks))


def limits(records: list[dict]) -> Figure | None:
    """Ops without a product beside a copy of their bytes; the others by FLOP per byte."""
    kept = {record["case"].replace(KEPT, ""): record for record in records if KEPT in record["case"]}
    moved = [record for record in records if not record["flops"] and KEPT not in record["case"]]
    products = [record for record in records if record["flops"]]
    if not moved or not products:
        return None
    figure = Figure(figsize=(12, 1.8 + 0.2 * len(moved)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    by_label(left, moved, lambda record, row: row["of_baseline"])
    for i, record in enumerate(moved):
        if record["case"] in kept:
            share = ours(kept[record["case"]])["of_baseline"]
            left.plot(share, i, linestyle="", marker="o", color="C0", fillstyle="none", markersize=7)
    left.axvline(1, color="0.5", linewidth=1)
    left.set_title("bytes alone: speed, a copy of the same run = 1", loc="left", fontsize=10)
    left.set_xlabel("ring: in memory that the process keeps", fontsize=8)
    copy = max(row["gb_per_s"] for record in moved for way, row in record["times"].items() if way.startswith("copy of"))
    roofline(right, products, copy)
    legend(figure, moved)
    return figure


def roofline(axes: Axes, records: list[dict], copy: float) -> None:
    """Numbered marks of ours and of the fastest rival; a bar at the fastest library GEMM of the same run."""
    gemms: dict[str, float] = {}
    lowest, height = copy, min(0.042, 0.5 / len(records))  # of a line of the list below the marks, in axes
    for i, record in enumerate(records):
        intensity = record["flops"] / record["bytes"] * 1.035 ** (i % 3 - 1)  # apart where they coincide
        gemm = max(row["gflop_per_s"] for row in record["times"].values() if "extra_mib" not in row)
        dtype = shape(record["case"])[1].get("dtype", "float32")
        gemms[dtype] = max(gemm, gemms.get(dtype, 0))
        rivals = [row["gflop_per_s"] for way, row in record["times"].items() if is_rival(record, way)]
        axes.plot(intensity, gemm, linestyle="", marker="_", markersize=11, color="0.2")
        axes.plot(intensity, ours(record)["gflop_per_s"], linestyle="", **WHOSE["qrm_fast"], markersize=5)
        if rivals:
            lowest = min(lowest, max(rivals))
            axes.plot(intensity, max(rivals), linestyle="", **WHOSE["PyTorch"], markersize=5)
        place = (intensity, ours(record)["gflop_per_s"])
        axes.annotate(str(i + 1), place, xytext=(0, 5), textcoords="offset points", fontsize=8, ha="center")
        axes.text(0.98, 0.02 + height * (len(records) - 1 - i), f"{i + 1}  {label(record)}", fontsize=7, ha="right",
                  transform=axes.transAxes)  # fmt: skip
    top, far = max(gemms.values()), 60 * max(record["flops"] / record["bytes"] for record in records)
    for dtype, gemm in gemms.items():
        axes.plot([gemm / copy, far], [gemm, gemm], color="0.6", linewidth=1)
        text, place = f"{dtype} GEMM, {gemm:.0f} GFLOP/s", "bottom" if gemm == top else "top"
        axes.annotate(text, (far, gemm), ha="right", va=place, fontsize=7, color="0.3")
    axes.plot([1, top / copy], [copy, top], color="0.6", linewidth=1)
    axes.annotate(f"copy, {copy:.0f} GB/s", (2, 2 * copy), fontsize=7, color="0.3", va="top", xytext=(6, -4),
                  textcoords="offset points")  # fmt: skip
    listed = height * len(records) + 0.06
    bottom = lowest / (3 * top / lowest) ** (listed / (1 - listed))
    axes.set(xscale="log", yscale="log", xlim=(1, far), ylim=(bottom, 3 * top))
    axes.set_title("products: GFLOP/s, beside the fastest other way", loc="left", fontsize=10)
    axes.set_xlabel("FLOP per byte; bar: library GEMM of the same run, lines: of any", fontsize=8)


def ways(records: list[dict]) -> Figure:
    """Time and memory of every way to a result."""
    figure = Figure(figsize=(12, 1.5 + 0.2 * len(records)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_label(left, records, lambda record, row: row["median_ms"] / ours(record)["median_ms"])
    by_label(right, records, lambda record, row: row["extra_mib"])
    left.axvline(1, color="0.5", linewidth=1)
    left.set_title("time, ours = 1", loc="left", fontsize=10)
    right.set_title("extra memory, MiB", loc="left", fontsize=10)
    legend(figure, records)
    return figure


def growth(records: list[dict]) -> Figure | None:
    """A row per sweep: time and memory against the size, with the fitted exponents."""
    found = sweeps(records)
    if not found:
        return None
    figure = Figure(figsize=(11, 0.6 + 2.5 * len(found)), layout="constrained")
    for sweep, row in zip(found, figure.subplots(len(found), 2, squeeze=False), strict=True):
        for axes, key, unit in zip(row, ("median_ms", "extra_mib"), ("ms", "extra MiB"), strict=True):
            for way in results_of(sweep.records[0]):
                exponent = sweep.exponent(way, key)
                if exponent is not None:
                    values = [record["times"][way][key] for record in sweep.records]
                    text = f"{way}: {sweep.over}^{exponent:.2f}"
                    axes.plot(sweep.sizes, values, markersize=4, linewidth=1, label=text, **WHOSE[whose(way)])
            axes.set(xscale="log", yscale="log", xlabel=sweep.over, ylabel=unit)
            low, high = axes.get_ylim()
            wider = max(1.0, (30 * low / high) ** 0.5)  # what does not grow is to look flat
            axes.set_ylim(low / wider, high * wider)
            axes.set_xticks(sweep.sizes, [f"{size:,}" for size in sweep.sizes], fontsize=8)
            axes.set_xticks([], minor=True)
            axes.legend(fontsize=7, frameon=False)
        row[0].set_title(f"{sweep.op}, {fixed(sweep.records[0], sweep.over)}", loc="left", fontsize=9)
    return figure


def errors(records: list[dict]) -> Figure:
    """How far each way is from float64."""
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(records)), layout="constrained")
    axes = figure.subplots()
    by_label(axes, records, lambda _, row: row.get("error"))
    for i, record in enumerate(records):
        if re.match(CONTRACT_HOLDS, record["case"]):
            axes.plot([CONTRACT, CONTRACT], [i - 0.45, i + 0.45], color="C3", linewidth=1.5)
    axes.set_title("distance from float64; red: what a forward pass may be off by", loc="left", fontsize=10)
    legend(figure, records)
    return figure


CONTRACT_HOLDS = r"linear_(logprobs_forward\[|q_values|sample).* cpu$"


def steps(records: list[dict]) -> Figure:
    """A bar per case: what its parts take of our time; the ops of this package in colour, from the left."""
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(records)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(records)
    own = dict.fromkeys(name for record in records for name in of_ours(record["shares"]))
    shown = [name for name in own if any(record["shares"].get(name, 0) >= 1e-3 for record in records)]
    greys = dict(zip((*LIBRARIES, REST), ("0.35", "0.5", "0.65", "0.85"), strict=True))
    for name, colour in [*((name, f"C{i}") for i, name in enumerate(shown)), *greys.items()]:
        widths = [100 * record["shares"].get(name, 0) for record in records]
        axes.barh(range(len(records)), widths, 0.6, left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 100), ylim=(len(records) - 0.5, -0.5), yticks=range(len(records)))
    axes.set_yticklabels(map(fixed, records), fontsize=7)
    axes.set_xlabel("of a step of training, %", fontsize=8)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=6)
    return figure


def grows(record: dict) -> bool:
    return record["suite"] == "growth"


def has_rival(record: dict) -> bool:
    return not grows(record) and KEPT not in record["case"] and any(is_rival(record, way) for way in record["times"])


def has_error(record: dict) -> bool:
    return any("error" in row for row in record["times"].values())


KINDS = {  # what a picture shows, and how
    "limits": (lambda record: record["bytes"] and not grows(record), limits),
    "ways": (has_rival, ways),
    "growth": (grows, growth),
    "errors": (has_error, errors),
    "steps": (lambda record: "shares" in record, steps),
}
