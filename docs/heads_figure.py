"""How far heads are from float64: the table of docs/heads.md and docs/heads.svg, by `python -m docs.heads_figure`.

Packages that can be imported take part (bench/rivals.py); what they do to logits is imitated in any case.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import rivals
from bench.bench_heads import exact_gradients, gradients, naive, naive_in_float32, of_logits
from bench.provenance import provenance
from bench.render import provenance_line
from qrm_fast import linear_logprobs

from .figure import save

PAGE = Path(__file__).with_name("heads.md")
SHAPE = {"num_tokens": 1024, "dim": 512, "vocab": 32768}
LARGEST_LOGIT = 30.0
SCALES = [2, 5, 10, 20, 30, 45, 60]  # largest logits of the figure
CLIP = 0.2  # of PPO's ratio
COLUMNS = ["inputs", "head", "log-probability", "PPO ratio", "entropy", "hidden's gradient", "weight's gradient"]


def problem(largest: float, num_tokens: int, dim: int, vocab: int) -> tuple[Tensor, ...]:
    """hidden and weight in bfloat16 whose largest |logit| is about `largest`; actions drawn from their policy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, dim, generator=generator).bfloat16()
    weight = torch.randn(vocab, dim, generator=generator)
    weight = (weight * (largest / (hidden.float() @ weight.T).abs().max())).bfloat16()
    policy = (hidden.float() @ weight.float().T).softmax(-1)
    return hidden, weight, policy.multinomial(1, generator=generator)[:, 0]


def imitation(logits: torch.dtype = torch.float32, gradient: torch.dtype = torch.float32) -> rivals.Head:
    """A head in float32, but for its logits, and the gradient of the logits, which are rounded to these dtypes."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        z = hidden.float() @ weight.float().T
        z = z + (z.to(logits).float() - z).detach()
        if z.requires_grad:
            z.register_hook(lambda dz: dz.to(gradient).float())
        return of_logits(z, targets)

    return head


IN_BFLOAT16: dict[str, rivals.Head] = {
    "qrm_fast": linear_logprobs,
    "qrm_fast as on CUDA: dZ in bfloat16, imitated": imitation(gradient=torch.bfloat16),
    "float16 logits, imitated": imitation(logits=torch.float16),
    "bfloat16 logits, log_softmax in float32": naive_in_float32,
    "bfloat16 logits and log_softmax": naive,
}
IN_FLOAT32: dict[str, rivals.Head] = {"qrm_fast": linear_logprobs, "float32 logits and log_softmax": naive}


class Errors(NamedTuple):
    """The largest of each result, by row; of gradients the relative distance (Frobenius norm)."""

    logprobs: float
    ratio: float
    entropy: float
    of_hidden: float
    of_weight: float


def ratio_errors(logprobs: Tensor, exact: Tensor) -> Tensor:
    """What PPO's ratio is off by, [T], where the policy that drew the actions is the one that is trained."""
    return torch.expm1(logprobs.double() - exact).abs()


def table() -> str:
    hidden, weight, targets = problem(LARGEST_LOGIT, **SHAPE)
    advantages = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    logprobs, entropy = naive(hidden.double(), weight.double(), targets)
    packages, _, absent = rivals.heads(torch.device("cpu"))

    def loss(rows: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        return -(advantages[rows] * logprobs).mean()

    def errors(head: rivals.Head, dtype: torch.dtype) -> Errors:
        leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with torch.no_grad():
            got = [x.double() for x in head(*leaves, targets)[:2]]
        pairs = zip(gradients(loss, head, leaves, targets, slice(None)), exact, strict=True)
        return Errors(
            (got[0] - logprobs).abs().max().item(),
            ratio_errors(got[0], logprobs).max().item(),
            (got[1] - entropy).abs().max().item(),
            *(((x.double() - y).norm() / y.norm()).item() for x, y in pairs),
        )

    exact = exact_gradients(lambda rows, *x: len(hidden[rows]) / len(hidden) * loss(rows, *x), hidden, weight, targets)
    rounding = (((x.bfloat16().double() - x).norm() / x.norm()).item() for x in exact)
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines.append(["bfloat16", "float64, gradients rounded once", "", "", "", *(f"{x:.1e}" for x in rounding)])
    for dtype, heads in (torch.bfloat16, IN_BFLOAT16 | packages), (torch.float32, IN_FLOAT32):
        for name, head in heads.items():
            lines.append([str(dtype).removeprefix("torch."), name, *(f"{x:.1e}" for x in errors(head, dtype))])
    rows = ["| " + " | ".join(cells) + " |" for cells in lines]
    notes = [f"Absent: {', '.join(absent)}."] if absent else []
    shape = ", ".join(f"{k}={v}" for k, v in SHAPE.items())
    what = f"{shape}, largest |logit| {(hidden.double() @ weight.double().T).abs().max():.3g}, on the CPU:"
    return "\n".join([what, "", *rows, "", *notes, provenance_line({"device": "cpu", "provenance": provenance("cpu")})])


def draw() -> Figure:
    shown = [name for name in IN_BFLOAT16 if "dZ" not in name]
    errors: dict[str, dict[float, Tensor]] = {name: {} for name in shown}
    for largest in SCALES:
        hidden, weight, targets = problem(largest, **SHAPE)
        exact = naive(hidden.double(), weight.double(), targets)[0]
        for name in shown:
            errors[name][largest] = ratio_errors(IN_BFLOAT16[name](hidden, weight, targets)[0], exact)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    share, growth = figure.subplots(1, 2)
    for i, name in enumerate(shown):
        ordered = errors[name][LARGEST_LOGIT].clamp(min=1e-9).sort().values
        places = torch.arange(7, len(ordered), 8)
        share.plot(ordered[places], 1 - (places + 1) / len(ordered), color=f"C{i}", label=name)
        growth.plot(SCALES, [x.max() for x in errors[name].values()], color=f"C{i}", marker="o", markersize=3)
        growth.plot(SCALES, [x.median() for x in errors[name].values()], color=f"C{i}", linestyle=":")
    share.axvline(CLIP, color="0.5", linewidth=1)
    share.annotate("PPO's clip", (CLIP, 0.5), rotation=90, ha="right", va="center", fontsize=8, color="0.4")
    share.set(xscale="log", xlim=(1e-8, 1), ylim=(0, 1.02), xlabel="|ratio - 1|", ylabel="share of tokens beyond")
    share.set_title(f"one unchanged policy, |logit| up to {LARGEST_LOGIT:.0f}", loc="left", fontsize=11)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(shown))
    growth.axhline(CLIP, color="0.5", linewidth=1)
    growth.annotate("PPO's clip", (SCALES[0], CLIP), va="bottom", fontsize=8, color="0.4")
    growth.set(yscale="log", ylim=(1e-8, 1), xlabel="largest |logit|", ylabel="|ratio - 1|")
    growth.set_title("largest of 1024 tokens; dotted: median", loc="left", fontsize=11)
    return figure


if __name__ == "__main__":
    block = f"<!-- accuracy -->\n{table()}\n<!-- end -->"
    text, found = re.subn(r"<!-- accuracy -->\n.*?<!-- end -->", lambda _: block, PAGE.read_text(), flags=re.DOTALL)
    assert found == 1, f"{PAGE} must have one place for the table, got {found}"
    PAGE.write_text(text)
    save(draw(), "heads")
