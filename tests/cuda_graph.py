"""A CUDA graph of a step, for the tests on a GPU."""

from collections.abc import Callable

import torch


def replayed(step: Callable) -> object:
    """What `step`, which has run before, returns when it is captured and the graph is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    return results
