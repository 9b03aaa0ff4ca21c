"""A CUDA graph of a step, for the tests on a GPU."""

from collections.abc import Callable

import torch


def captured(step: Callable) -> Callable[[], object]:
    """Replays `step`, which has run before, and returns what it returns; the next replay writes there too."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def replayed(step: Callable) -> object:
    """What `step` returns when it is captured and the graph is replayed."""
    return captured(step)()
