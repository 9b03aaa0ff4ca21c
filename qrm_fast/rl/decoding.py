"""One more token for every row of a cache: over the columns that some row sees, or in shapes for a CUDA graph."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .attention import backbone
from .row_cache import RowCache


class Step:
    """Computes over the columns from the first that a row sees on: as little as there is."""

    may_drop_rows = True

    def __init__(self, model: Any, cache: RowCache, most_positions: int) -> None:
        self.model, self.cache, self.most_positions = model, cache, most_positions

    def __call__(self, token: Tensor, start: Tensor) -> Tensor:
        """Hidden states [R, D] behind `token` [R] of rows that begin at column `start` [R]."""
        cache = self.cache
        columns = torch.arange(cache.first, cache.now + 1, device=token.device)
        seen = columns >= start[:, None]  # [R, C]
        return self._hidden(token[:, None], self._positions(start), seen[:, None, None])

    def _positions(self, start: Tensor) -> Tensor:
        """[R, 1]; a row without an answer goes on, and may not leave the positions that the model has."""
        return (self.cache.now - start)[:, None].clamp(max=self.most_positions - 1)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        return backbone(self.model)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class FixedStep(Step):
    """Computes over the whole buffer of a cache with fixed shapes, and on CUDA records that as a graph.

    A small model's step is a thousand launches of a few microseconds each; a graph makes them one. Where a model cannot
    be recorded a warning says so, and its steps are launched one by one.
    """

    may_drop_rows = False

    def __init__(self, model: Any, cache: RowCache, most_positions: int) -> None:
        super().__init__(model, cache, most_positions)
        assert cache.column is not None  # it has fixed shapes, too
        device, self.column = model.device, cache.column
        self.columns = torch.arange(cache.room, device=device)
        self.token = torch.zeros(cache.num_rows, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self.seen = torch.zeros(cache.num_rows, 1, 1, cache.room, dtype=torch.bool, device=device)
        self.recorded = device.type != "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, token: Tensor, start: Tensor) -> Tensor:
        cache = self.cache
        columns = self.columns + cache.offset
        self.token.copy_(token[:, None])
        self.position.copy_(self._positions(start))
        self.seen.copy_(((columns >= start[:, None]) & (columns <= cache.now))[:, None, None])
        self.column.fill_(cache.now - cache.offset)
        if not self.recorded:
            self._record()
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.hidden

    def _run(self) -> None:
        self.hidden = self._hidden(self.token, self.position, self.seen)

    def _record(self) -> None:
        self.recorded = True
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run()  # what only a first call allocates and tunes is not to be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
            self.graph = graph
        except RuntimeError as error:  # of its own code, which may ask the device for a number
            said = " ".join(str(error).split())
            warnings.warn(f"{type(self.model).__name__} is sampled without a CUDA graph: {said}", stacklevel=2)


def can_be_fixed(model: Any, room: int) -> bool:
    """Whether the steps of `model` may see `room` columns in any order of their last one: no window is smaller."""
    windows = (
        getattr(model.config.get_text_config(), name, None) for name in ("sliding_window", "attention_chunk_size")
    )
    return all(window is None or window >= room for window in windows)
