"""Draws docs/advantages.svg: `python -m docs.advantages_figure`."""

import torch
from matplotlib.figure import Figure

import qrm_fast

from .figure import save

# A sample answer: seven steps, the fifth of them the worst, with the rows each takes.
STEP_REWARDS = torch.tensor([0.9, 0.7, 0.95, -0.45, -0.6, 0.8, 0.6])
STEP_ROWS = torch.tensor([24, 30, 18, 36, 28, 20, 30])
OPERATORS = ["sum", "mean", "soft", "hard", "causal_soft", "revmin"]


def draw() -> Figure:
    step_ends = STEP_ROWS.cumsum(0) - 1
    num_tokens = int(STEP_ROWS.sum())
    cu_seqlens = torch.tensor([0, num_tokens])
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, operator in zip(figure.subplots(2, 3, sharex=True).flatten(), OPERATORS, strict=True):
        form = qrm_fast.min_form_returns(STEP_REWARDS, step_ends, cu_seqlens, operator=operator)
        axes.axhline(0, color="0.6", linewidth=0.8)
        rewards = STEP_REWARDS.repeat_interleave(STEP_ROWS)
        axes.step(range(num_tokens), rewards, where="mid", color="0.7", linewidth=1.2, label="step reward")
        axes.step(range(num_tokens), form.returns, where="mid", color="C0", linewidth=2, label="return")
        worst_end = int(step_ends[form.worst_step])
        axes.axvspan(
            worst_end + 1 - int(STEP_ROWS[form.worst_step]), worst_end + 1, color="C3", alpha=0.15, linewidth=0
        )
        axes.set_title(operator, loc="left", fontsize=11)
        axes.set_xlim(0, num_tokens)
        if operator != "sum":
            axes.set_ylim(-0.75, 1.05)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("token of the answer (the worst step is shaded)", fontsize=10)
    return figure


if __name__ == "__main__":
    save(draw(), "advantages")
