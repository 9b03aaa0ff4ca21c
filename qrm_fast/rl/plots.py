"""Figures: the curves of training runs, and answers with every token coloured by its Q."""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, pstdev
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .config import TOKEN_SCORES

# ---- curves


class Panel(NamedTuple):
    title: str
    y: str
    limits: tuple[float | None, float | None]  # of the vertical axis
    keys: dict[str, str]  # key of metrics.jsonl: its name in the legend; one line style each
    x: str = "iteration"


SHARE = (-0.02, 1.02)


def of_answers(title: str, prefix: str, what: str) -> list[Panel]:
    """The panels of a reward model that is trained on pairs, or on answers judged as a whole."""
    shown = {"": "training batch", "heldout_": "held out, after training"}
    return [
        Panel(name, y, limits, {f"{prefix}/{when}{key}": label for when, label in shown.items()}, "optimiser step")
        for name, y, limits, key in (
            (title, f"{what} accuracy (share)", SHARE, "accuracy"),
            (f"{title} loss per {what}", "nats", (0, None), "loss"),
        )
    ]


PANELS = [
    Panel("Pass@1", "right answers (share)", SHARE, {"eval/pass@1_sampled": "sampled", "eval/pass@1_greedy": "greedy"}),
    Panel(
        "Reward: Q of sampled tokens",
        "mean Q (raw)",
        (None, None),
        {"reward/q_mean": "mean", **{f"reward/{name}/q_mean": name for name in TOKEN_SCORES}},
    ),
    Panel(
        "Reward: steps",
        "reward in [-1, 1]",
        (None, None),
        {"reward/process": "soft minimum of an answer", "reward/step_mean": "mean of all steps"},
    ),
    Panel(
        "Warnings of a hacked PRM",
        "share",
        SHARE,
        {
            "process/short_mass": "of |A| on answers of < 8 tokens",
            "process/one_step_mass": "of |A| on answers of one step",
            "process/short": "answers of < 8 tokens",
            "process/one_step": "answers of one step",
        },
    ),
    Panel("Steps per answer", "steps", (0, None), {"process/num_steps": "mean"}),
    Panel("Reward: verifier", "right answers (share)", SHARE, {"reward/mean": "mean"}),
    Panel(
        "KL per token",
        "nats",
        (None, None),
        {"policy/ref_kl": "from the starting policy", "policy/approx_kl": "from the sampling policy"},
    ),
    Panel("Entropy per token", "nats", (0, None), {"policy/entropy": "mean"}),
    Panel("Answer length", "tokens", (0, None), {"response/length": "mean"}),
    Panel("SFT loss per token", "nats", (0, None), {"sft/loss": "training batch"}, "optimiser step"),
    *of_answers("Q-RM", "qrm", "pair"),
    *of_answers("ORM", "orm", "pair"),
    *of_answers("DPO", "dpo", "pair"),
    *of_answers("Implicit reward model", "implicit", "answer"),
    Panel("PRM loss per step", "nats", (0, None), {"prm/loss": "training batch"}, "optimiser step"),
    Panel(
        "PRM",
        "accuracy (share)",
        SHARE,
        {
            "prm/accuracy": "steps, training batch",
            "prm/heldout_accuracy": "steps, held out",
            "prm/heldout_first_error": "first wrong step found, held out",
        },
        "optimiser step",
    ),
    Panel(
        "Throughput",
        "tokens/s",
        (0, None),
        {f"perf/{phase}_tokens_per_s": phase for phase in ("update", "rollout", "score")},
        "iteration or step",
    ),
]
LINE_STYLES = ("-", "--", ":", "-.")


def read_runs(directory: str | Path) -> dict[str, list[dict[str, float]]]:
    """The rows of every metrics.jsonl in `directory` and below, by its folder's path from there.

    Raises FileNotFoundError where there is none, ValueError naming file and line for a line that is not JSON.
    """
    runs = {}
    for path in sorted(Path(directory).rglob("metrics.jsonl")):
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: expected one JSON object per line, got {error}") from None
        runs[str(path.parent.relative_to(directory))] = rows
    if not runs:
        raise FileNotFoundError(f"expected a metrics.jsonl in {directory} or below it, found none")
    return runs


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], only: Sequence[str] = ()) -> Figure:
    """All `runs` (name: rows of its metrics.jsonl) overlaid, in one panel per kind of metric that occurs in them.

    Runs whose names end in the same folder, such as seed0/policy and seed1/policy, share a colour. `only`: titles of
    the panels to draw, in place of all.
    """
    panels = [panel for panel in PANELS if any(_points(rows, key) for rows in runs.values() for key in panel.keys)]
    panels = [panel for panel in panels if not only or panel.title in only]
    if not panels:
        keys = sorted({key for rows in runs.values() for row in rows for key in row})
        raise ValueError(f"runs must hold metrics of a training, got only {', '.join(keys) or 'no rows'}")
    colours = {leaf: f"C{i}" for i, leaf in enumerate(dict.fromkeys(Path(name).name for name in runs))}
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    figure = Figure(figsize=(4.4 * width, 3.1 * height), layout="constrained", dpi=130)
    grid = figure.subplots(height, width, squeeze=False).flatten()
    for panel, axes in zip(panels, grid, strict=False):
        _draw_panel(axes, panel, runs, colours)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _draw_panel(
    axes: Axes, panel: Panel, runs: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]
) -> None:
    runs_in_legend: dict[str, Line2D] = {}
    keys_in_legend: dict[str, Line2D] = {}
    for name, rows in runs.items():
        leaf = Path(name).name
        for style, (key, label) in zip(cycle(LINE_STYLES), panel.keys.items(), strict=False):
            points = _points(rows, key)
            if not points:
                continue
            marker = "o" if len(points) < 20 else None
            look: dict[str, Any] = dict(linestyle=style, linewidth=1.3, marker=marker, markersize=3)
            axes.plot(*zip(*points, strict=True), color=colours[leaf], **look)
            runs_in_legend[leaf] = Line2D([], [], color=colours[leaf], label=leaf)
            keys_in_legend[label] = Line2D([], [], color="0.3", label=label, **look)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x, fontsize=9)
    axes.set_ylabel(panel.y, fontsize=9)
    axes.set_ylim(*panel.limits)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter("{x:,.6g}")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [*keys_in_legend.values(), *(runs_in_legend.values() if len(runs_in_legend) > 1 else ())]
    axes.legend(handles=handles, fontsize=7, framealpha=0.7)


def _points(rows: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    # A KL of zero is one to no reference or, up to rounding, to the policy itself: on-policy, there is nothing to see.
    nothing = key in ("policy/ref_kl", "policy/approx_kl") and all(abs(value) < 1e-9 for _, value in points)
    return [] if nothing else points


def spreads(arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], keys: Mapping[str, str]) -> Figure:
    """Metrics by iteration, one panel for each of `keys` (key: its name), of `arms` (name: rows of every seed).

    Lines are means over the seeds, bands go from the smallest to the largest.
    """
    figure = Figure(figsize=(4.4 * len(keys), 3.6), layout="constrained", dpi=110)
    for axes, (key, name) in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys.items(), strict=True):
        for i, (arm, runs) in enumerate(arms.items()):
            columns = zip(*(_points(rows, key) for rows in runs), strict=True)
            points = [(column[0][0], [value for _, value in column]) for column in columns]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            look: dict[str, Any] = dict(color=f"C{i % 10}", linestyle=LINE_STYLES[i // 10])
            axes.plot(steps, [fmean(x) for x in values], linewidth=1.3, label=arm, **look)
            axes.fill_between(
                steps, *zip(*((min(x), max(x)) for x in values), strict=True), color=f"C{i % 10}", alpha=0.12
            )
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("iteration", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7, framealpha=0.7)
    return figure


# ---- calibration


def calibration(bins: Sequence[tuple[float, float, int]]) -> Figure:
    """Of steps binned by P(right): their mean P(right), the share that is right, how many they are."""
    figure = Figure(figsize=(4.4, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    predicted, right, num_steps = zip(*bins, strict=True)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    axes.plot(predicted, right, color="C0", linewidth=1.3)
    sizes = [20 + 180 * num / max(num_steps) for num in num_steps]
    axes.scatter(predicted, right, s=sizes, color="C0", label="steps, larger: more of them")
    axes.set(xlim=SHARE, ylim=SHARE)
    axes.set_xlabel("P(right) that the PRM gives", fontsize=9)
    axes.set_ylabel("steps that are right (share)", fontsize=9)
    axes.set_title("Calibration of the PRM", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, framealpha=0.7)
    return figure


# ---- best of k


def accuracy_by_tokens(results: Sequence[tuple[int, float, float, float]], chooser: str) -> Figure:
    """Of `best_of`: the share of right answers by the tokens sampled, as `chooser` chooses and at best."""
    figure = Figure(figsize=(4.4, 3.4), layout="constrained", dpi=130)
    axes = figure.subplots()
    num_answers, accuracy, some_right, num_tokens = zip(*results, strict=True)
    axes.plot(num_tokens, some_right, color="0.5", linewidth=1.3, linestyle="--", marker="o", markersize=3)
    axes.plot(num_tokens, accuracy, color="C0", linewidth=1.3, marker="o", markersize=3)
    axes.axhline(accuracy[0], color="0.5", linewidth=1, linestyle=":")
    for k, x, y in zip(num_answers, num_tokens, accuracy, strict=True):
        axes.annotate(f"k = {k}", (x, y), textcoords="offset points", xytext=(0, -11), fontsize=7)
    axes.legend(["one of k is right", f"chosen by {chooser}", "one answer"], fontsize=7, framealpha=0.7)
    axes.set_xscale("log")
    axes.set_ylim(*SHARE)
    axes.set_xlabel("tokens sampled for a problem", fontsize=9)
    axes.set_ylabel("right answers (share)", fontsize=9)
    axes.set_title("Best of k", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ---- heat maps


class Answer(NamedTuple):
    title: str
    tokens: list[str]
    q: list[float]


WIDE, NARROW = 96, 60  # characters across the page: of running text, and of short answers, set large and side by side
PAGE, MARGIN = 6.4, 0.5  # inches
ADVANCE = 0.602  # of DejaVu Sans Mono, which matplotlib ships, as a share of the font size
BAR, CHART = 0.13, 1.9  # inches


def first_difference(answers: Sequence[Answer]) -> int | None:
    """Index of the first token in which the answers differ; None for one answer, or for equal ones."""
    columns = enumerate(zip(*(answer.tokens for answer in answers), strict=False))
    return next((t for t, column in columns if len(set(column)) > 1), None)


def heat_map(prompt: str, answers: Sequence[Answer], *, advantages: bool = False) -> Figure:
    """Answers to one prompt with every token coloured by its Q, all on one scale, and Q by position below them.

    The first token in which they differ is framed: before it the Q-RM has seen the same text, and Q is the same.
    `advantages`: what is given is not Q but A, which has a zero.
    """
    fork = first_difference(answers)
    q = [x for answer in answers for x in answer.q]
    # Q is known up to an offset per prompt, so white is the mean of what is shown, not zero.
    centre = 0.0 if advantages else fmean(q)
    widest = max(abs(x - centre) for x in q)
    spread = (widest if advantages else min(2.5 * pstdev(q), widest)) or 1.0
    name, white = ("A", "none") if advantages else ("Q", "the mean of the tokens shown")
    colour = ScalarMappable(Normalize(centre - spread, centre + spread), _pale("RdBu"))

    layouts = [_lay_out(answer.tokens, WIDE) for answer in answers]
    longest = max(token.column + len(token.text) for layout in layouts for token in layout)
    num_characters, abreast = (NARROW, True) if len(answers) * (longest + 4) <= NARROW else (WIDE, False)
    depths = [layout[-1].line + 1 for layout in layouts]
    asked = wrap(f"Prompt: {prompt}", num_characters)
    num_lines = len(asked) + (max(depths) + 1.5 if abreast else sum(depths) + 1.5 * len(depths))

    font_size = 72 * PAGE / num_characters / ADVANCE  # points
    line = 1.9 * font_size / 72  # inches
    width, height = PAGE + 2 * MARGIN, (num_lines + 1) * line + 0.9 + CHART + 0.6
    figure = Figure(figsize=(width, height), dpi=150)

    def place(top: float, tall: float) -> Axes:
        """Axes between the margins; both measures in inches."""
        return figure.add_axes((MARGIN / width, 1 - (top + tall) / height, PAGE / width, tall / height))

    page = place(line / 2, num_lines * line)
    page.set(xlim=(0, num_characters), ylim=(num_lines, 0))
    page.set_axis_off()
    text: dict[str, Any] = dict(family="DejaVu Sans Mono", fontsize=font_size, va="center", parse_math=False)
    for i, row in enumerate(asked):
        page.text(0, i + 0.5, row, **text)
    left, top = 0.0, float(len(asked))
    for answer, layout, depth in zip(answers, layouts, depths, strict=True):
        page.text(left, top + 1, answer.title, fontweight="bold", **text)
        for t, (token, value) in enumerate(zip(layout, answer.q, strict=True)):
            x, y = left + token.column, top + 1.5 + token.line
            frame: dict[str, Any] = dict(edgecolor="white", linewidth=0.6)
            if t == fork:
                frame = dict(edgecolor="black", linewidth=1.2, zorder=2)
            (face,) = colour.to_rgba(np.array([value]))
            page.add_patch(Rectangle((x, y + 0.06), len(token.text), 0.88, facecolor=face, **frame))
            blanks = len(token.text) - len(token.text.lstrip(" "))
            page.text(x + blanks, y + 0.5, token.text[blanks:], zorder=3, **text)
        left, top = (left + num_characters / len(answers), top) if abreast else (left, top + depth + 1.5)

    below = (num_lines + 1) * line
    bar = figure.colorbar(colour, place(below, BAR), orientation="horizontal", extend="both")
    bar.set_label(f"{name} of a token (raw); white: {white}", fontsize=8)
    bar.ax.tick_params(labelsize=7)

    chart = place(below + 0.9, CHART)
    for answer in answers:
        chart.plot(answer.q, marker="o", markersize=2.5, linewidth=1, label=answer.title)
    if fork is not None:
        chart.axvline(fork, color="black", linestyle="--", linewidth=1, label="first different token")
    chart.set_xlabel("token of the answer", fontsize=8)
    chart.set_ylabel(f"{name} (raw)", fontsize=8)
    chart.tick_params(labelsize=7)
    chart.grid(alpha=0.25)
    chart.spines[["top", "right"]].set_visible(False)
    chart.legend(fontsize=7, framealpha=0.7)
    return figure


class Placed(NamedTuple):
    text: str
    line: int
    column: int


def _lay_out(tokens: Sequence[str], num_characters: int) -> list[Placed]:
    """Tokens side by side in lines of `num_characters`; a line break in a token is shown, and taken."""
    placed = []
    line = column = 0
    for token in tokens:
        text = token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace("\t", "\N{RIGHTWARDS ARROW}")
        text = text or "\N{EMPTY SET}"
        if column and column + len(text) > num_characters:
            line, column = line + 1, 0
        placed.append(Placed(text, line, column))
        column += len(text)
        if "\n" in token:
            line, column = line + 1, 0
    return placed


def _pale(name: str) -> Colormap:
    """A colour map without its dark ends, on which black text cannot be read."""
    colours = colormaps[name]
    return LinearSegmentedColormap.from_list(f"pale {name}", [colours(0.15 + 0.7 * i / 255) for i in range(256)])
