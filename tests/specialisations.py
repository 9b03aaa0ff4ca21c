"""The machine codes of the launches of tests/launches, counted: `python tests/specialisations.py`, JSON out.

By architecture: for the sizes of a training step, and for several other numbers of tokens, steps and sequences as well.
"""

import importlib
import json
import sys

import launches
from aot import ROOMS
from recorder import recording

SIZES = [(16384, 2048, 512), (16385, 2047, 511), (12000, 1999, 480), (777, 112, 16), (16388, 2052, 514)]  # T, K, S


def main() -> None:
    counts = {}
    for capability in 80, 90, 100:
        found: set = set()
        grown = []
        for sizes in SIZES:
            launches.T, launches.K, launches.S = sizes
            with recording(capability) as made:
                for file in sorted(ROOMS.glob("[!_]*.py")):
                    importlib.reload(importlib.import_module(f"launches.{file.stem}")).launches(capability)
            found |= {(launch.kernel, launch.key) for launch in made}
            grown.append(len(found))
        counts[capability] = grown[0], grown[-1]
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main()
