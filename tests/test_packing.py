"""Packing against plain Python lists: both layouts by hand for two sequences, then as properties of any batch.

Left out: a batch of 2^31 tokens that passes (16 GiB of ids); its error is tested with one list repeated.
"""

import heapq
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qrm_fast import PackedBatch, from_padded, pack, per_token, plan_microbatches, to_padded, unpack

examples = settings(deadline=None, max_examples=60)
token_ids = st.integers(0, 2**63 - 1)
# Prompt and response of at most 6 sequences; responses may be empty.
batches = st.lists(st.tuples(st.lists(token_ids, min_size=1, max_size=8), st.lists(token_ids, max_size=8)), max_size=6)
# Few different ones, so that neighbours have the same, or one that only begins the same.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4)
any_lengths = st.lists(st.integers(0, 9), max_size=8)


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def same_batch(got: PackedBatch, expected: PackedBatch) -> None:
    for name, g, e in zip(PackedBatch._fields, got, expected, strict=True):
        if g is None or e is None:
            assert g is e, name
            continue
        assert_close(g, e, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


class TestPack:
    def test_two_sequences_by_hand(self):
        # Sequence 0: prompt 11 12 13, response 14 15.  Sequence 1: prompt 21, response 22.
        batch = pack([[11, 12, 13, 14, 15], [21, 22]], [3, 1])
        same_batch(
            batch,
            PackedBatch(
                input_ids=torch.tensor([11, 12, 13, 14, 15, 21, 22]),
                position_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1]),
                cu_seqlens=torch.tensor([0, 5, 7], dtype=torch.int32),
                targets=torch.tensor([12, 13, 14, 15, -100, 22, -100]),
                action_mask=torch.tensor([False, False, True, True, False, True, False]),
                action_index=torch.tensor([2, 3, 5]),
                action_cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
                seq_ids=torch.tensor([0, 0, 1]),
                max_seqlen=5,
                whole_rows=None,
                whole_cu_seqlens=None,
            ),
        )
        # What the heads read: the policy the row that predicts the action, the Q-head the row that consumed it.
        assert batch.targets[batch.action_index].tolist() == [14, 15, 22]
        assert batch.input_ids[batch.action_index].tolist() == [13, 14, 21]
        assert batch.input_ids[batch.action_index + 1].tolist() == [14, 15, 22]

    @examples
    @given(batches)
    def test_any_batch_is_the_plain_loop(self, batch):
        expected = PackedBatch([], [], [0], [], [], [], [0], [], max((len(p + r) for p, r in batch), default=0))
        for s, (prompt, response) in enumerate(batch):
            tokens = prompt + response
            for i, token in enumerate(tokens):
                last = i + 1 == len(tokens)
                is_action = i + 1 >= len(prompt) and not last
                if is_action:
                    expected.action_index.append(len(expected.input_ids))
                    expected.seq_ids.append(s)
                expected.input_ids.append(token)
                expected.position_ids.append(i)
                expected.targets.append(-100 if last else tokens[i + 1])
                expected.action_mask.append(is_action)
            expected.cu_seqlens.append(len(expected.input_ids))
            expected.action_cu_seqlens.append(len(expected.action_index))
        dtypes = {"cu_seqlens": torch.int32, "action_cu_seqlens": torch.int32, "action_mask": torch.bool}
        got = pack([p + r for p, r in batch], [len(p) for p, _ in batch])
        same_batch(
            got,
            PackedBatch(
                *(
                    torch.tensor(x, dtype=dtypes.get(f, torch.int64))
                    for f, x in zip(got._fields[:8], expected[:8], strict=True)
                ),
                expected.max_seqlen,
            ),
        )
        assert [x.tolist() for x in unpack(got.input_ids, got.cu_seqlens)] == [p + r for p, r in batch]
        actions = got.targets[got.action_index]
        assert [x.tolist() for x in unpack(actions, got.action_cu_seqlens)] == [r for _, r in batch]

    def test_a_shared_prompt_by_hand(self):
        # Prompt 11 12 13 with the responses 14 15, nothing and 16; then another prompt with the response 22.
        batch = pack([[11, 12, 13, 14, 15], [11, 12, 13], [11, 12, 13, 16], [21, 22]], [3, 3, 3, 1], share_prompts=True)
        same_batch(
            batch,
            PackedBatch(
                input_ids=torch.tensor([11, 12, 13, 14, 15, 13, 13, 16, 21, 22]),
                position_ids=torch.tensor([0, 1, 2, 3, 4, 2, 2, 3, 0, 1]),
                cu_seqlens=torch.tensor([0, 5, 6, 8, 10], dtype=torch.int32),
                targets=torch.tensor([12, 13, 14, 15, -100, -100, 16, -100, 22, -100]),
                action_mask=torch.tensor([i in (2, 3, 6, 8) for i in range(10)]),
                action_index=torch.tensor([2, 3, 6, 8]),
                action_cu_seqlens=torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32),
                seq_ids=torch.tensor([0, 0, 2, 3]),
                max_seqlen=5,
                whole_rows=torch.tensor([0, 1, 2, 3, 4, 0, 1, 5, 0, 1, 6, 7, 8, 9]),
                whole_cu_seqlens=torch.tensor([0, 5, 8, 12, 14], dtype=torch.int32),
            ),
        )

    @examples
    @given(st.lists(st.tuples(prompts, st.lists(st.lists(token_ids, max_size=5), max_size=4)), max_size=4))
    def test_sharing_leaves_rows_out_and_nothing_else(self, groups):
        answers = [(prompt, response) for prompt, responses in groups for response in responses]
        sequences, lens = [p + r for p, r in answers], [len(p) for p, _ in answers]
        apart, shared = pack(sequences, lens), pack(sequences, lens, share_prompts=True)
        saved = sum(len(p) - 1 for (p, _), (q, _) in pairwise(answers) if p == q)
        assert len(apart.input_ids) - len(shared.input_ids) == saved
        if not saved:
            return same_batch(shared, apart)
        assert torch.equal(shared.whole_cu_seqlens, apart.cu_seqlens)
        for name in ("input_ids", "position_ids"):
            assert torch.equal(getattr(shared, name)[shared.whole_rows], getattr(apart, name))
        for name in ("action_cu_seqlens", "seq_ids"):
            assert torch.equal(getattr(shared, name), getattr(apart, name))
        assert shared.max_seqlen == apart.max_seqlen
        # What the heads read: the rows that predict an action and those that have consumed it, and the actions.
        for rows in (lambda batch: batch.action_index, lambda batch: batch.action_index + 1):
            for name in ("input_ids", "position_ids"):
                assert torch.equal(getattr(shared, name)[rows(shared)], getattr(apart, name)[rows(apart)])
        assert torch.equal(shared.targets[shared.action_index], apart.targets[apart.action_index])
        assert torch.equal(shared.action_mask.nonzero()[:, 0], shared.action_index)
        # The last rows of a sequence are its own: queries that see all of it.
        ends, whole_ends = shared.cu_seqlens[1:], shared.whole_cu_seqlens[1:]
        assert torch.equal(shared.whole_rows[(whole_ends - 1).long()], ends.long() - 1)

    def test_tuples_and_an_empty_batch(self):
        same_batch(pack(((1, 2), (3,)), (1, 1)), pack([[1, 2], [3]], [1, 1]))
        empty = pack([], [])
        assert empty.cu_seqlens.tolist() == empty.action_cu_seqlens.tolist() == [0]
        assert empty.input_ids.numel() == empty.seq_ids.numel() == empty.max_seqlen == 0

    def test_the_callers_lists_are_copied(self):
        sequences = [[1, 2, 3]]
        batch = pack(sequences, [1])
        batch.input_ids.zero_()
        assert sequences == [[1, 2, 3]]

    @pytest.mark.parametrize(
        ("sequences", "prompt_lens", "error", "message"),
        [
            ([[1], [2]], [1], ValueError, "one entry per sequence, 2, got 1"),
            ([[1], [2, 3]], [1, 3], ValueError, r"prompt_lens\[1\] must be between 1 and 2, the length of .*, got 3"),
            ([[1], [2, 3]], [1, 0], ValueError, r"prompt_lens\[1\] must be between 1 and 2, the length of .*, got 0"),
            ([[1], [2]], [1, -1], ValueError, r"prompt_lens\[1\] must be in \[0, 2\^63\), got -1"),
            ([[1], []], [1, 1], ValueError, r"sequences\[1\] must hold at least one prompt token, got an empty list"),
            ([[1], [2, -100]], [1, 1], ValueError, r"sequences\[1\]\[1\] must be in \[0, 2\^63\), got -100"),
            ([[1], [2, 2**63]], [1, 1], ValueError, r"sequences\[1\]\[1\] must be in .*, got 9223372036854775808"),
            ([[1], [2, "a"]], [1, 1], TypeError, r"sequences\[1\]\[1\] must be an int, got str"),
            ([[1], [2, 3.0]], [1, 1], TypeError, r"sequences\[1\]\[1\] must be an int, got float"),
            ([[1], "ab"], [1, 1], TypeError, r"sequences\[1\] must be a list of token ids, got str"),
            ([[1], torch.tensor([2])], [1, 1], TypeError, r"sequences\[1\] must be a list .*, got Tensor"),
            (7, [1], TypeError, "sequences must be a list of lists of token ids, got int"),
            ([[1]], torch.tensor([1]), TypeError, "prompt_lens must be a list of ints, got Tensor"),
            ([[1]], [1.0], TypeError, r"prompt_lens\[0\] must be an int, got float"),
            ([[0] * 2**16] * 2**15, [1] * 2**15, ValueError, r"fewer than 2\^31 tokens, .*, got 2147483648"),
        ],
    )
    def test_bad_input_names_the_sequence(self, sequences, prompt_lens, error, message):
        with pytest.raises(error, match=message):
            pack(sequences, prompt_lens)


class TestFromPadded:
    def test_holes_left_padding_and_an_empty_row_by_hand(self):
        mask = torch.tensor([[False, True, True], [True, False, True], [False, False, False]])
        ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        values = ids + torch.tensor([0.25, float("nan")])[:, None, None].expand(2, 1, 1)[0]
        cu_seqlens, packed_ids, packed_values = from_padded(mask, ids, values)
        assert cu_seqlens.tolist() == [0, 2, 4, 4] and cu_seqlens.dtype == torch.int32
        assert packed_ids.tolist() == [2, 3, 4, 6]
        assert packed_values.tolist() == [2.25, 3.25, 4.25, 6.25]

    def test_masked_nan_leaks_neither_forward_nor_backward(self):
        mask = torch.tensor([[True, False], [True, True]])
        x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]], requires_grad=True)
        _, packed = from_padded(mask, x)
        (packed**2).sum().backward()
        assert x.grad.tolist() == [[2, 0], [4, 6]]

    @examples
    @given(st.integers(0, 4).flatmap(lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width))))
    def test_any_mask_is_the_plain_loop(self, mask):
        width = len(mask[0]) if mask else 3
        x = torch.arange(2 * len(mask) * width).reshape(len(mask), width, 2)
        cu_seqlens, packed = from_padded(torch.tensor(mask, dtype=torch.bool).reshape(len(mask), width), x)
        rows = [[v for v, m in zip(xs, ms, strict=True) if m] for xs, ms in zip(x.tolist(), mask, strict=True)]
        assert [part.tolist() for part in unpack(packed, cu_seqlens)] == rows

    def test_strided_inputs(self):
        mask, x = torch.rand(3, 8) > 0.5, torch.randn(8, 3, 2)
        assert_close(
            from_padded(mask[:, 2:], x.transpose(0, 1)[:, 2:]),
            from_padded(mask[:, 2:].contiguous(), x.transpose(0, 1)[:, 2:].contiguous()),
            rtol=0,
            atol=0,
        )

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_masks_of_integers_as_trainers_carry_them(self, dtype):
        mask = torch.tensor([[0, 1, 1], [1, 0, 2], [0, 0, 0]], dtype=dtype)
        cu_seqlens, rows = from_padded(mask, torch.arange(9).view(3, 3))
        assert cu_seqlens.tolist() == [0, 2, 4, 4] and rows.tolist() == [1, 2, 3, 5]

    def test_bad_input(self):
        mask = torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(TypeError, match=r"mask must be \[B, L\] bool or int32 or int64, got \[2, 3\] float32"):
            from_padded(mask.float())
        with pytest.raises(
            ValueError, match=r"tensors\[1\] must be \[B, L, ...\] with \[B, L\] = \[2, 3\], got \[3, 2\]"
        ):
            from_padded(mask, mask, mask.T)
        with pytest.raises(TypeError, match=r"tensors\[0\] must be a tensor \[B, L, ...\], got list"):
            from_padded(mask, [[1, 2, 3]])
        with pytest.raises(ValueError, match=r"tensors\[0\] must be on cpu like mask, got meta"):
            from_padded(mask, mask.to("meta"))
        with pytest.raises(ValueError, match=r"fewer than 2\^31 positions, .*, got 2147483648"):
            from_padded(mask[:1, :1].expand(2**31, 1))


class TestToPadded:
    @pytest.mark.parametrize(
        ("side", "expected"),
        [
            ("right", [[1, 2, -1], [-1, -1, -1], [3, 4, 5]]),
            ("left", [[-1, 1, 2], [-1, -1, -1], [3, 4, 5]]),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
    def test_by_hand(self, side, expected, dtype):
        x = torch.tensor([1, 2, 3, 4, 5], dtype=dtype)
        out = to_padded(x, cumulative([2, 0, 3]), 3, side=side, fill=-1)
        assert out.tolist() == expected
        assert out.dtype == dtype

    @examples
    @given(any_lengths, st.sampled_from(["left", "right"]), st.integers(0, 3), st.sampled_from([(), (2,)]))
    def test_round_trip(self, lengths, side, spare, trailing):
        x = torch.randn(sum(lengths), *trailing, requires_grad=True)
        cu_seqlens, width = cumulative(lengths), max(lengths, default=0) + spare
        padded = to_padded(x, cu_seqlens, width, side=side, fill=float("nan"))
        mask = to_padded(torch.ones(len(x), dtype=torch.bool), cu_seqlens, width, side=side)
        assert padded.shape == (len(lengths), width, *trailing)
        assert mask.tolist() == [
            [False] * (width - n) + [True] * n if side == "left" else [True] * n + [False] * (width - n)
            for n in lengths
        ]
        assert padded[~mask].isnan().all()
        cu_again, x_again = from_padded(mask, padded)
        assert_close((cu_again, x_again), (cu_seqlens, x), rtol=0, atol=0)
        weight = torch.randn_like(x)
        (x_again * weight).sum().backward()
        assert_close(x.grad, weight, rtol=0, atol=0)

    def test_compiles_with_dynamic_shapes(self):
        compiled = torch.compile(to_padded, fullgraph=True, dynamic=True)
        for lengths in ([2, 0, 3], [1, 4, 1, 7]):
            x = torch.randn(sum(lengths), 2, requires_grad=True)
            got = compiled(x, cumulative(lengths), 8, side="left", fill=1)
            assert_close(got, to_padded(x, cumulative(lengths), 8, side="left", fill=1), rtol=0, atol=0)
            (got**2).sum().backward()
            assert_close(x.grad, 2 * x, rtol=0, atol=0)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compiled(x, cumulative(lengths), 6, side="left", fill=1)

    def test_bad_input(self):
        x, cu_seqlens = torch.zeros(5), cumulative([2, 3])
        with pytest.raises(ValueError, match="sequence 1 has 3 rows, more than the width, 2"):
            to_padded(x, cu_seqlens, 2)
        with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'top'"):
            to_padded(x, cu_seqlens, 3, side="top")
        with pytest.raises(TypeError, match=r"x must be a tensor \[T, ...\], got list"):
            to_padded([0.0] * 5, cu_seqlens, 3)
        with pytest.raises(ValueError, match=r"x must be \[T, ...\], got a 0-d tensor"):
            to_padded(x[0], cu_seqlens, 3)
        with pytest.raises(ValueError, match="x must be on cpu like cu_seqlens, got meta"):
            to_padded(x.to("meta"), cu_seqlens, 3)


class TestUnpack:
    @examples
    @given(any_lengths, st.sampled_from([torch.int32, torch.int64]))
    def test_rows_of_each_sequence(self, lengths, dtype):
        x = torch.arange(2.0 * sum(lengths)).reshape(-1, 2)
        parts = unpack(x, cumulative(lengths, dtype))
        assert [len(p) for p in parts] == lengths
        assert_close(torch.cat([x[:0], *parts]), x, rtol=0, atol=0)
        assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in parts)

    def test_gradients_flow(self):
        x = torch.arange(3.0, requires_grad=True)
        first, second = unpack(x, cumulative([2, 1]))
        (first.sum() + 10 * second.sum()).backward()
        assert x.grad.tolist() == [1, 1, 10]


class TestPerToken:
    def test_by_hand(self):
        x = torch.tensor([0.5, float("nan"), -2.0], requires_grad=True)
        out = per_token(x, cumulative([2, 0, 3]), 5)
        assert out.tolist() == [0.5, 0.5, -2, -2, -2]
        out.backward(torch.tensor([1.0, 2, 3, 4, 5]))
        assert x.grad.tolist() == [3, 0, 12]

    @examples
    @given(any_lengths, st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    def test_every_row_has_its_sequences_value(self, lengths, dtype):
        x = torch.arange(len(lengths)).to(dtype)
        out = per_token(x, cumulative(lengths), sum(lengths))
        assert out.dtype == dtype
        assert out.tolist() == [v for v, n in zip(x.tolist(), lengths, strict=True) for _ in range(n)]

    def test_gradient_is_rounded_once(self):
        # 1 + 512 ulps of one sixteenth each: bfloat16 sums would stay at 1.
        x = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
        per_token(x, cumulative([513]), 513).backward(torch.tensor([1.0] + [2.0**-9] * 512).bfloat16())
        assert x.grad.item() == 2.0

    @pytest.mark.unpoisoned
    def test_gradient_bits_ignore_neighbours_and_repeat(self):
        lengths = [70_000, 1, 4097, 0, 333]
        grad, gradients = torch.randn(sum(lengths)), []
        for _ in range(3):
            x = torch.zeros(len(lengths), requires_grad=True)
            per_token(x, cumulative(lengths), sum(lengths)).backward(grad)
            gradients.append(x.grad)
        for part, *together in zip(grad.split(lengths), *gradients, strict=True):
            x = torch.zeros(1, requires_grad=True)
            per_token(x, cumulative([len(part)]), len(part)).backward(part)
            assert [g.item() for g in together] == [x.grad.item()] * 3

    def test_gradcheck(self):
        x = torch.randn(4, dtype=torch.float64, requires_grad=True)
        cu_seqlens = cumulative([2, 0, 1, 4])
        assert torch.autograd.gradcheck(lambda x: per_token(x, cu_seqlens, 7), x)
        assert torch.autograd.gradgradcheck(lambda x: per_token(x, cu_seqlens, 7), x)

    def test_compiles_with_dynamic_shapes(self):
        compiled = torch.compile(per_token, fullgraph=True, dynamic=True)
        for lengths in ([2, 0, 3], [1, 4, 1, 7]):
            x = torch.randn(len(lengths), requires_grad=True)
            got = compiled(x, cumulative(lengths), sum(lengths))
            assert_close(got, per_token(x, cumulative(lengths), sum(lengths)), rtol=0, atol=0)
            got.sum().backward()
            assert x.grad.tolist() == lengths

    def test_bad_input(self):
        x = torch.zeros(2)
        with pytest.raises(ValueError, match=r"cu_seqlens must be \[S\+1\] .* with S\+1 = 3, got \[4\]"):
            per_token(x, cumulative([1, 1, 1]), 3)
        with pytest.raises(ValueError, match=r"x must be \[S\]"):
            per_token(x[None], cumulative([1, 1]), 2)
        with pytest.raises(TypeError, match=r"got .* complex64"):
            per_token(x.cfloat(), cumulative([1, 1]), 2)


@pytest.mark.parametrize(
    "use",
    [unpack, lambda x, cu: to_padded(x, cu, 5), lambda x, cu: per_token(x[: len(cu) - 1], cu, len(x))],
    ids=["unpack", "to_padded", "per_token"],
)
@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([1, 2, 5], ValueError, "cu_seqlens must start at 0, got 1"),
        ([0, 3, 2, 5], ValueError, "cu_seqlens must not decrease, got 3 then 2 at index 2"),
        ([0, 3, 4], ValueError, "cu_seqlens must end at the number of packed rows, 5, got 4"),
        ([0.0, 5.0], TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64, got \[2\] float32"),
    ],
)
def test_bad_boundaries(use, cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        use(torch.zeros(5), torch.tensor(cu_seqlens))


@pytest.mark.unpoisoned
def test_nothing_waits_for_the_device(device):
    sequences, prompt_lens = [[11, 12, 13], [21, 22]], [1, 2]

    def everything(device):
        batch = pack(sequences, prompt_lens, device=device)
        pack([], [], device=device)
        x = torch.ones(2, requires_grad=True, device=device)
        actions = per_token(x, batch.action_cu_seqlens, 2)
        padded = to_padded(actions, batch.action_cu_seqlens, 3, side="left")
        return *batch[:8], actions, padded, *torch.autograd.grad(padded.square().sum(), x)

    everything(device)  # what a first call sets up may wait
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        results = everything(device)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(results, everything("cpu"), strict=True):
        assert got.device.type == device
        assert_close(got.cpu(), want, rtol=0, atol=0)


def token_cost(n, cost):
    return n if cost == "linear" else n * (24576 + n)


def longest_first(lengths, costs, num_bins):
    """The bins of longest-first greedy, blind to the budget."""
    bins = [(0, b, []) for b in range(num_bins)]
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        total, b, members = heapq.heappop(bins)
        heapq.heappush(bins, (total + costs[s], b, [*members, s]))
    return [members for _, _, members in bins]


def best_fit(lengths, max_tokens):
    """How many bins best-fit decreasing needs."""
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= n]
        rooms.append(max_tokens - n)
        if fitting:
            rooms.remove(min(fitting))
            rooms[-1] = min(fitting) - n
    return len(rooms)


class TestPlanMicrobatches:
    def test_by_hand(self):
        # 16 tokens, 6 per bin, 2 ranks: 2 micro-batches each. Longest-first greedy: {5} {4} | {3, 1} {3}, a step of
        # 5 + 4. Under the first micro-batch's peak there is room for the last token: {5} {4, 1} | {3} {3}, 5 + 3.
        plan = plan_microbatches([3, 1, 5, 4, 3], max_tokens=6, num_ranks=2)
        assert plan == [[[2], [0]], [[1, 3], [4]]]

    def test_bisection_beats_longest_first(self):
        # Greedy: {7, 4, 4} {7, 4} {6, 5} {6, 5}.  Best: {7, 5} {7, 5} {6, 6} {4, 4, 4}.
        plan = plan_microbatches([7, 7, 6, 6, 5, 5, 4, 4, 4], max_tokens=15, num_ranks=4)
        assert sorted(rank[0] for rank in plan) == [[0, 4], [1, 5], [2, 3], [6, 7, 8]]

    def test_the_dearest_bin_is_never_dearer_than_greedys(self):
        # {7} {4, 4} | {2} {} would be a shorter step, 8 + 2, than greedy's {7} {4} | {4} {2}, but for a bin of 8.
        assert plan_microbatches([7, 4, 4, 2], max_tokens=8, num_ranks=2) == [[[0], [3]], [[1], [2]]]

    def test_attention_cost_balances_the_squares(self):
        # A token costs 24576 + 16384 in the long sequence and 24576 + 1024 in a short one: 1.6 times as much.
        lengths = [16384] + [1024] * 48
        linear, attention = (
            plan_microbatches(lengths, max_tokens=65536, num_ranks=2, cost=c) for c in ("linear", "attention")
        )
        assert sorted(len(rank[0]) for rank in linear) == [17, 32]
        assert sorted(len(rank[0]) for rank in attention) == [12, 37]

    def test_fewer_sequences_than_bins(self):
        assert plan_microbatches([], max_tokens=8, num_ranks=2) == [[], []]
        assert plan_microbatches([3], max_tokens=8, num_ranks=3) == [[[0]], [[]], [[]]]
        assert plan_microbatches([8, 8, 8], max_tokens=8, num_ranks=2) == [[[0], [2]], [[1], []]]
        assert plan_microbatches([0, 0, 0], max_tokens=8, num_ranks=1) == [[[0, 1, 2]]]

    @examples
    @given(
        st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), max_size=40))),
        st.integers(1, 5),
        st.sampled_from(["linear", "attention"]),
    )
    def test_any_plan_keeps_its_promises(self, budget_and_lengths, num_ranks, cost):
        max_tokens, lengths = budget_and_lengths
        plan = plan_microbatches(lengths, max_tokens=max_tokens, num_ranks=num_ranks, cost=cost)
        assert plan == plan_microbatches(tuple(lengths), max_tokens=max_tokens, num_ranks=num_ranks, cost=cost)
        num_micro = len(plan[0])
        assert [len(rank) for rank in plan] == [num_micro] * num_ranks
        assert sorted(s for rank in plan for micro in rank for s in micro) == list(range(len(lengths)))
        assert all(sum(lengths[s] for s in micro) <= max_tokens for rank in plan for micro in rank)
        assert all(micro == sorted(micro) for rank in plan for micro in rank)
        for rank in plan:  # the empty micro-batches come last
            assert [bool(micro) for micro in rank] == sorted((bool(micro) for micro in rank), reverse=True)
        assert num_micro <= -(-best_fit(lengths, max_tokens) // num_ranks)
        if not lengths:
            return
        costs = [token_cost(n, cost) for n in lengths]
        greedy = longest_first(lengths, costs, num_micro * num_ranks)
        if max(sum(lengths[s] for s in members) for members in greedy) > max_tokens:
            return
        totals = sorted((sum(costs[s] for s in members) for members in greedy), reverse=True)
        peaks = [max(sum(costs[s] for s in rank[m]) for rank in plan) for m in range(num_micro)]
        assert max(peaks) <= totals[0]
        assert sum(peaks) <= sum(totals[::num_ranks])

    def test_large_batch(self):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randn(4096, generator=generator).exp().mul(1000).int().clamp(1, 16384).tolist()
        plan = plan_microbatches(lengths, max_tokens=16384, num_ranks=8)
        totals = torch.tensor([[sum(lengths[s] for s in micro) for micro in rank] for rank in plan])
        assert totals.shape[1] == -(-sum(lengths) // (8 * 16384))
        assert totals.amax(0).sum() <= 1.001 * sum(lengths) / 8

    @pytest.mark.parametrize(
        ("lengths", "options", "error", "message"),
        [
            ([3, 9], {"max_tokens": 8}, ValueError, r"lengths\[1\] must be at most max_tokens, 8, got 9"),
            ([3, -1], {"max_tokens": 8}, ValueError, r"lengths\[1\] must be in \[0, 2\^63\), got -1"),
            ([3, 2.0], {"max_tokens": 8}, TypeError, r"lengths\[1\] must be an int, got float"),
            (torch.tensor([3]), {"max_tokens": 8}, TypeError, "lengths must be a list of ints, got Tensor"),
            ([3], {"max_tokens": 0}, ValueError, r"max_tokens must be in \[1, 2\^31\), .*, got 0"),
            ([3], {"max_tokens": 2**31}, ValueError, r"max_tokens must be in .*, got 2147483648"),
            ([3], {"max_tokens": 8, "num_ranks": 0}, ValueError, "num_ranks must be at least 1, got 0"),
            ([3], {"max_tokens": 8, "cost": "quadratic"}, ValueError, "cost must be .*, got 'quadratic'"),
        ],
    )
    def test_bad_input(self, lengths, options, error, message):
        with pytest.raises(error, match=message):
            plan_microbatches(lengths, **options)
