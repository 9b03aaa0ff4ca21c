"""Tokenised rows of data, and the micro-batches in which they share a forward pass."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from .. import PackedBatch, pack, plan_microbatches


class TokenRow(Protocol):
    """What one row of data became: the answers to a prompt, which stay in one micro-batch."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def sequences(self) -> Sequence[list[int]]:
        """Of each answer, the prompt and the answer."""


Row = TypeVar("Row", bound=TokenRow)


def num_tokens(rows: Iterable[TokenRow]) -> int:
    return sum(len(sequence) for row in rows for sequence in row.sequences)


def microbatches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """All `rows` in parts of at most `max_tokens`, by length: packed attention takes equally long neighbours in one
    call. Raises ValueError for a row over the budget."""
    plan = plan_microbatches([num_tokens([row]) for row in rows], max_tokens=max_tokens)[0]
    return [sorted((rows[i] for i in bin), key=lambda row: list(map(len, row.sequences))) for bin in plan]


def pack_rows(rows: Iterable[TokenRow], device: str) -> PackedBatch:
    """The sequences of all rows, in their order."""
    pairs = [(sequence, len(row.prompt)) for row in rows for sequence in row.sequences]
    return pack([sequence for sequence, _ in pairs], [prompt_len for _, prompt_len in pairs], device=device)


def sharing_units(
    order: Iterable[int],
    groups: Sequence[int],
    lengths: Sequence[int],
    prompt_lens: Sequence[int] | None,
    max_tokens: int,
) -> tuple[list[list[int]], list[int]]:
    """Sequences in `order`, neighbours of one of the `groups` in one unit, and the rows of every unit.

    They share their prompt, and are together as far as `max_tokens` holds them; alone without `prompt_lens`.
    """
    units: list[list[int]] = []
    rows: list[int] = []
    for s in order:
        is_sibling = units and groups[s] == groups[units[-1][0]]
        shared = prompt_lens[s] - 1 if prompt_lens and is_sibling else 0
        if shared and rows[-1] + lengths[s] - shared <= max_tokens:
            units[-1].append(s)
            rows[-1] += lengths[s] - shared
        else:
            units.append([s])
            rows.append(lengths[s])
    return units, rows
