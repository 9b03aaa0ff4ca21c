"""How the figures of this folder look, and that drawing one twice gives the same bytes."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent


def save(figure: Figure, name: str, folder: Path = FOLDER) -> Path:
    """Write NAME.svg, its words as text."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path
