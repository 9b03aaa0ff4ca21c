"""The cache of sampling against a list of tokens per row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrm_fast.rl.row_cache import Prefix, RowCache

WIDTH, LONGEST, ROWS = 5, 6, 3


def as_keys(tokens):
    """[H, P, D] of two heads of different sign."""
    x = torch.tensor(tokens, dtype=torch.float32)[:, None]
    return torch.stack([x, -x])


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(1, 8))
def test_a_row_holds_its_prompt_and_what_came_after_it(data, spare):
    cache = RowCache(1, ROWS, width=WIDTH, room=WIDTH + LONGEST + spare)
    rows = [([], 0, 0)] * ROWS  # tokens, first column, steps left
    tokens = iter(range(1, 10**6))
    for step in range(40):
        free = [r for r, (*_, left) in enumerate(rows) if left == 0]
        taken = data.draw(st.lists(st.sampled_from(free), unique=True)) if free and step else free
        if taken:
            prompt = [next(tokens) for _ in range(data.draw(st.integers(1, WIDTH)))]
            cache.enter(torch.tensor(taken), Prefix([as_keys(prompt)], [-as_keys(prompt)], torch.zeros(1)))
            for r in taken:
                rows[r] = list(prompt), cache.now - len(prompt), data.draw(st.integers(1, LONGEST))
        busy = [r for r, (*_, left) in enumerate(rows) if left > 0]
        cache.see_from(min((rows[r][1] for r in busy), default=cache.now))
        new = [next(tokens) for _ in rows]
        written = as_keys(new).transpose(0, 1)[:, :, None]  # [R, H, 1, D]
        keys, values = cache.layers[0].update(written, -written)
        assert keys.shape == values.shape == (len(rows), 2, cache.now - cache.first + 1, 1)
        for r in busy:
            seen, start, left = rows[r]
            seen.append(new[r])
            rows[r] = seen, start, left - 1
            assert keys[r, 0, start - cache.first :, 0].tolist() == seen
            assert torch.equal(keys[r, 1], -keys[r, 0]) and torch.equal(values[r], -keys[r])
        assert keys.isfinite().all()
        cache.now += 1
        if step == 30 and busy:
            cache.keep(torch.tensor(busy))
            rows = [rows[r] for r in busy]
