"""Keys and values of the answers that are sampled at a time, one row each: rows enter and leave, columns move on."""

from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class Prefix(NamedTuple):
    """What a model has computed of a prompt of P tokens."""

    keys: list[Tensor]  # of every layer [H, P, D]
    values: list[Tensor]
    hidden: Tensor  # [D] of the last token


class RowCache(Cache):
    """R rows that end at one column, whatever their length: a step writes the same column of all.

    A prompt, of at most `width` tokens, is written in front of the next column, `now`: it may enter at any step.
    Columns are counted on for ever; the buffer holds `room` of them, from `offset` on, and the steps see those from
    `first` on. It must hold the longest row and should hold some more: whenever it is full, all is moved to its
    beginning. With `fixed` shapes a step sees the whole buffer, and writes the column of it that `column` [1] says.
    """

    def __init__(
        self, num_layers: int, num_rows: int, *, width: int, room: int, fixed: torch.device | None = None
    ) -> None:
        super().__init__(layers=[RowLayer(self) for _ in range(num_layers)])
        self.column = None if fixed is None else torch.zeros(1, dtype=torch.int64, device=fixed)
        self.num_rows, self.width, self.room = num_rows, width, room
        self.offset, self.first, self.now = 0, width, width

    def enter(self, rows: Tensor, prefix: Prefix) -> None:
        """Give `rows` to answers to the prompt of `prefix`, whose first column is then now - P."""
        end = self.now - self.offset
        for layer, *pair in zip(self.layers, prefix.keys, prefix.values, strict=True):
            for room, x in zip(layer.rooms(*pair), pair, strict=True):
                room[rows, :, end - x.shape[1] : end] = x

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.num_rows = len(rows)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def see_from(self, first: int) -> None:
        """Forget the columns before `first`, and make room for the next one."""
        self.first = first
        if self.now - self.offset == self.room:
            kept = min(first, self.now - self.width)  # a prompt that enters needs its columns
            for layer in self.layers:
                for room in (layer.keys, layer.values):
                    room[:, :, : self.now - kept] = room[:, :, kept - self.offset :].clone()
            self.offset = kept


class RowLayer(DynamicLayer):
    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        # a proxy: in a cycle the buffers would stay through the update, until Python looks for cycles
        self.cache: Any = proxy(cache)
        self.is_initialized = False

    def rooms(self, *pair: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers [R, H, room, D]. Made when the first keys and values [H, P, D] come."""
        if not self.is_initialized:
            # zeros: what a row has not written is masked, but must be finite
            shape = (self.cache.num_rows, self.cache.room)
            self.keys, self.values = (x.new_zeros(shape[0], x.shape[0], shape[1], x.shape[2]) for x in pair)
            self.is_initialized = True
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        cache = self.cache
        if cache.column is not None:
            for room, x in ((self.keys, key_states), (self.values, value_states)):
                room.index_copy_(2, cache.column, x)
            return self.keys, self.values
        begin, now = cache.first - cache.offset, cache.now - cache.offset
        self.keys[:, :, now : now + 1] = key_states
        self.values[:, :, now : now + 1] = value_states
        return self.keys[:, :, begin : now + 1], self.values[:, :, begin : now + 1]

    def get_seq_length(self) -> int:
        return self.cache.now - self.cache.first


def prefixes(hidden: Tensor, cache: Cache, lengths: list[int]) -> list[Prefix]:
    """What a packed forward pass over prompts of `lengths` has left, by prompt. `hidden`: [N, D]."""
    ends = torch.tensor(lengths).cumsum(0) - 1
    keys, values = (
        zip(*(getattr(layer, name)[0].split(lengths, 1) for layer in cache.layers), strict=True)
        for name in ("keys", "values")
    )
    return [Prefix(list(k), list(v), hidden[end]) for k, v, end in zip(keys, values, ends.tolist(), strict=True)]
