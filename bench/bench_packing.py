"""Packing of token lists: bound by reading Python's ints one by one and writing the fields, beside a copy."""

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from qrm_fast import PackedBatch, pack

from .harness import Case, case, copy

# What one token makes pack read and write: a list's pointer and the 32 bytes of an int; 25 bytes of the model layout.
BYTES_PER_TOKEN, BYTES_PER_ACTION = 8 + 32 + 25, 16


@case(cpu=[{"num_sequences": 4096, "median_len": 300}])
def pack_token_lists(device: torch.device, num_sequences: int, median_len: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(num_sequences, generator=generator).exp()
    lengths = (median_len * spread).long().clamp(2, 8192).tolist()
    sequences = [torch.randint(1 << 17, (n,), generator=generator).tolist() for n in lengths]
    prompt_lens = [1 + n // 4 for n in lengths]
    num_tokens, num_actions = sum(lengths), sum(lengths) - sum(prompt_lens)

    def loop() -> list[Tensor]:
        """A few tensors per sequence, concatenated."""
        fields, bos = [], 0
        for s, (tokens, prompt_len) in enumerate(zip(sequences, prompt_lens, strict=True)):
            ids, position = torch.tensor(tokens), torch.arange(len(tokens))
            mask = (position >= prompt_len - 1) & (position < len(tokens) - 1)
            index = bos + torch.arange(prompt_len - 1, len(tokens) - 1)
            fields.append((ids, position, torch.cat([ids[1:], ids.new_tensor([-100])]), mask, index, index * 0 + s))
            bos += len(tokens)
        return [torch.cat(field) for field in zip(*fields, strict=True)]

    def vectorised() -> list[Tensor]:
        """One pass over the ids, the other fields by numpy over the whole batch."""
        length, prompt_len = np.array(lengths), np.array(prompt_lens)
        ends = length.cumsum()
        ids = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=num_tokens)
        position = np.arange(num_tokens) - np.repeat(ends - length, length)
        targets = np.append(ids[1:], -100)
        targets[ends - 1] = -100
        mask = (position >= np.repeat(prompt_len - 1, length)) & (position < np.repeat(length - 1, length))
        seq_ids = np.repeat(np.arange(num_sequences), length - prompt_len)
        return [torch.from_numpy(x) for x in (ids, position, targets, mask, mask.nonzero()[0], seq_ids)]

    def ours() -> PackedBatch:
        return pack(sequences, prompt_lens, device=device)

    def gate() -> None:
        batch = ours()
        ends = torch.tensor([0, *lengths]).cumsum(0)
        assert torch.equal(batch.cu_seqlens, ends.int())
        fields = (
            batch.input_ids,
            batch.position_ids,
            batch.targets,
            batch.action_mask,
            batch.action_index,
            batch.seq_ids,
        )
        for plain in (loop(), vectorised()):
            assert all(torch.equal(got, want) for got, want in zip(fields, plain, strict=True))

    num_bytes = BYTES_PER_TOKEN * num_tokens + BYTES_PER_ACTION * num_actions
    return Case(
        {"qrm_fast": ours, "numpy over the batch": vectorised, "torch calls per sequence": loop},
        gate,
        baseline=copy(num_bytes, device),
        bytes=num_bytes,
    )
