"""How the figures of this folder look, and that drawing one twice gives the same bytes."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save(figure: Figure, name: str) -> None:
    """Write docs/NAME.svg."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(Path(__file__).with_name(f"{name}.svg"), metadata={"Date": None})
