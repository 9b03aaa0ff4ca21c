"""q_head_advantages: the bits of its two ops on CPU, float64 for its Triton kernel, and the promises of every op."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate
from grids import LENGTHS, cu_seqlens, far_apart
from test_q_token_rewards import oracle
from triton import knobs
from triton.runtime import interpreter

from qrm_fast import q_head_advantages, q_token_rewards, token_q
from qrm_fast.ops.q_head_advantages import _q_head_advantages
from qrm_fast.triton import q_head_advantages as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter
LUCK = 4  # a sequence of two close scores has a small sigma, which magnifies whichever rounding they had
OPTIONS = [
    {},
    {"center": True, "eos_rescore": "mean"},
    {"min_std": 2.0, "eps": 0.5, "eos_rescore": "mean"},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """In the interpreter a program takes 16 rows, so that short sequences have several."""
    if knobs.runtime.interpret:
        for name, size in {"ROWS": 16, "BT": 8, "BD": 32, "BR": 16}.items():
            monkeypatch.setitem(triton_kernels.LAUNCH, name, size)


def inputs(lengths, dim=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(len(lengths))
    hidden = torch.randn(sum(lengths), dim, generator=g).to(dtype)
    head = torch.randn(dim, generator=g).to(dtype)
    return hidden, head, cu_seqlens(lengths), torch.rand(sum(lengths), generator=g) < 0.7


def composed(hidden, head, cu, mask=None, **options):
    q = token_q(hidden, head)
    return q_token_rewards(q if mask is None else q.where(mask, 0.0), cu, mask=mask, scope="sequence", **options)


def test_hand_computed():
    hidden, head = torch.tensor([[1.0, 0], [0, 1], [3, 1], [9, 9], [5, 5]]), torch.tensor([[1.0, 2]])
    cu = torch.tensor([0, 3, 5])  # q = 1, 2, 5, then 27, 15
    sigma = math.sqrt(26) / 3
    result = q_head_advantages(hidden, head, cu, eps=0.0)
    torch.testing.assert_close(result, torch.tensor([1 / sigma, 2 / sigma, 5 / sigma, 27 / 6, 15 / 6]))
    result = q_head_advantages(hidden, head[0], cu, center=True, eps=0.0)
    torch.testing.assert_close(result, torch.tensor([-5 / 3 / sigma, -2 / 3 / sigma, 7 / 3 / sigma, 1, -1]))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bits_are_those_of_the_two_ops(dtype, options):
    hidden, head, cu, mask = inputs([3, 0, 700, 1, 1500, 65], 200, dtype)
    for m in None, mask:
        assert torch.equal(
            q_head_advantages(hidden, head, cu, mask=m, **options), composed(hidden, head, cu, m, **options)
        )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = q_head_advantages(hidden[3:703], head, torch.tensor([0, 700]), mask=mask[3:703], **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, q_head_advantages(hidden, head, cu, mask=mask, **options)[3:703])


def exact_and_peer(hidden, head, cu, mask, options):
    """In float64, and in float32 by PyTorch's own operators."""
    q, peer_q = hidden.double() @ head.double(), (hidden.float() * head.float()).sum(1)
    exact = oracle(q, cu, mask=mask, scope="sequence", **options)
    peer = torch.zeros_like(peer_q)
    for bos, eos in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        rows = torch.arange(bos, eos) if mask is None else bos + mask[bos:eos].nonzero()[:, 0]
        if not len(rows):
            continue
        x = peer_q[rows]
        sigma = x.std(correction=0).clamp(min=options.get("min_std", 0.0))
        y = (x - x.mean() * options.get("center", False)) / (sigma + options.get("eps", 1e-8))
        y = y if sigma > 0 else torch.zeros_like(y)
        if options.get("eos_rescore") == "mean":
            y[-1] = y.mean()
        peer[rows] = y
    return exact, peer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_the_definition(lengths, options, device):
    hidden, head, cu, mask = inputs(lengths)
    exact, peer = exact_and_peer(hidden, head, cu, mask, options)
    result = q_head_advantages(*(x.to(device) for x in (hidden, head, cu)), mask=mask.to(device), **options)
    assert_as_accurate(result, exact, peer, slack=LUCK)


@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 17, 33], [16, 32, 0, 1, 90]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_agrees_with_the_definition(triton_device, lengths, dtype):
    hidden, head, cu, mask = inputs(lengths, 40, dtype)
    for options, m in zip(OPTIONS, (None, mask, mask), strict=True):
        exact, peer = exact_and_peer(hidden, head, cu, m, options)
        scalars = options.get("min_std", 0.0), options.get("eps", 1e-8)
        flags = options.get("center", False), options.get("eos_rescore") == "mean"
        on_device = [x if x is None else x.to(triton_device) for x in (hidden, head, cu, m)]
        assert_as_accurate(triton_kernels.launch(*on_device, *flags, *scalars).cpu(), exact, peer, slack=LUCK)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("lengths", [[5, 20, 3], [1, 90, 16, 0, 40]], ids=str)
def test_triton_bits_depend_on_the_own_sequence_only(triton_device, lengths):
    hidden, head, cu, mask = (x.to(triton_device) for x in inputs(lengths, 24))
    packed = triton_kernels.launch(hidden, head, cu, mask, True, True, 0.0, 1e-8)
    assert torch.equal(packed, triton_kernels.launch(hidden, head, cu, mask, True, True, 0.0, 1e-8))
    for bos, eos in itertools.pairwise(cu.tolist()):
        own = torch.tensor([0, eos - bos], device=triton_device)
        alone = triton_kernels.launch(hidden[bos:eos], head, own, mask[bos:eos], True, True, 0.0, 1e-8)
        assert torch.equal(alone, packed[bos:eos])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs programs in its own order")
def test_triton_bits_do_not_depend_on_which_program_is_last(monkeypatch):
    arguments = *inputs([5, 70, 33], 24), True, True, 0.0, 1e-8
    forwards = triton_kernels.launch(*arguments)
    numbered = interpreter.interpreter_builder.set_grid_idx
    num_programs = 108 // triton_kernels.LAUNCH["ROWS"] + 3
    for order in (lambda x: num_programs - 1 - x), (lambda x: x * 4 % num_programs):
        monkeypatch.setattr(
            interpreter.interpreter_builder, "set_grid_idx", lambda x, y, z, o=order: numbered(o(x), y, z)
        )
        assert torch.equal(triton_kernels.launch(*arguments), forwards)


def test_triton_stays_inside_its_tensors(triton_device):
    """Boundaries that a CPU kernel would refuse."""
    wide = torch.full((20, 8), 7.0, device=triton_device)
    for bounds in [0, 500], [-5, 4], [4, 1, 6]:
        cu = torch.tensor(bounds, device=triton_device)
        assert triton_kernels.launch(wide[5:15], wide[0], cu, None, False, True, 0.0, 1e-8).shape == (10,)


@pytest.mark.parametrize("by", ["cpp", "triton"])
def test_masked_and_broken_rows(by, triton_device):
    hidden, head, cu, mask = inputs([5, 9, 21])
    op = triton_kernels.launch if by == "triton" else _q_head_advantages
    on = triton_device if by == "triton" else "cpu"
    arguments = [x.to(on) for x in (head, cu, mask)]
    clean, dirty = (
        op(hidden.where(mask[:, None], poison).to(on), *arguments, True, True, 0.0, 1e-8) for poison in (0.0, math.nan)
    )
    assert torch.equal(clean, dirty) and not clean[~mask].any()
    hidden[mask.nonzero()[0]] = math.inf
    broken = op(hidden.to(on), *arguments[:2], None, False, False, 0.0, 1e-8)
    assert not broken[mask.nonzero()[0]].isfinite() and broken.isfinite().sum() == 34
    flat, own = torch.ones(7, 40, device=on), torch.tensor([0, 7], device=on)
    assert not op(flat, arguments[0], own, None, True, True, 0.0, 1e-8).any()


def test_strided_rows_are_read_in_place():
    hidden, head, cu, mask = inputs([5, 9])
    wide = torch.full((28, 45), math.nan)
    wide[::2, 2:42] = hidden
    assert torch.equal(
        q_head_advantages(wide[::2, 2:42], head, cu, mask=mask), q_head_advantages(hidden, head, cu, mask=mask)
    )


@pytest.mark.parametrize("by", ["cpp", "triton"])
def test_offsets_beyond_int32(by, tmp_path):
    """In the interpreter, which computes a kernel's indices in the dtypes that a GPU does."""
    if by == "triton" and torch.cuda.is_available():
        pytest.skip("rows of a sparse file on the host")
    hidden, head, cu, mask = inputs([3, 3], 16, torch.bfloat16)
    op = triton_kernels.launch if by == "triton" else _q_head_advantages
    arguments = head, cu, mask, True, True, 0.0, 1e-8
    far = far_apart(hidden, tmp_path / "hidden")
    assert far.stride(0) * 5 > 2**32 and torch.equal(op(far, *arguments), op(hidden, *arguments))


def test_autocast_casts_as_linear_does():
    hidden, head, cu, _ = inputs([5, 9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = q_head_advantages(hidden, head, cu)
    assert torch.equal(result, q_head_advantages(hidden.bfloat16(), head.bfloat16(), cu))


def test_not_differentiable():
    hidden, head, cu, _ = inputs([5, 9])
    with pytest.raises(RuntimeError, match="is not differentiable"):
        q_head_advantages(hidden.requires_grad_(), head, cu).sum().backward()


def test_opcheck():
    hidden, head, cu, mask = inputs([5, 0, 9])
    torch.library.opcheck(_q_head_advantages.op, (hidden, head, cu, mask, True, True, 0.0, 1e-8))
    torch.library.opcheck(_q_head_advantages.op, (hidden.half(), head.half(), cu, None, False, False, 0.1, 1e-8))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(q_head_advantages, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9], [8, 1, 6, 6, 70]:
        hidden, head, cu, mask = inputs(lengths)
        assert torch.equal(compiled(hidden, head, cu, mask=mask), q_head_advantages(hidden, head, cu, mask=mask))


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"hidden must be \[T, D\] .* got \[4\] float32", {"hidden": torch.zeros(4)}),
        (ValueError, r"head must be \[D\] float32 with D = 3, got \[2\] float32", {"head": torch.zeros(2)}),
        (ValueError, r"head must be \[1, D\] float32, got \[2, 3\] float32", {"head": torch.zeros(2, 3)}),
        (TypeError, r"head must be \[D\] float32, got \[3\] bfloat16", {"head": torch.zeros(3).bfloat16()}),
        (TypeError, r"mask must be \[T\] bool, got \[4\] float32", {"mask": torch.zeros(4)}),
        (
            ValueError,
            "cu_seqlens must end at the number of packed rows, 4, got 3",
            {"cu_seqlens": torch.tensor([0, 3])},
        ),
        (ValueError, "eos_rescore must be one of none, mean, got 'last'", {"eos_rescore": "last"}),
        (ValueError, "min_std and eps must be >= 0, got 0.0 and -1.0", {"eps": -1.0}),
    ],
)
def test_bad_input(error, message, options):
    arguments = {"hidden": torch.zeros(4, 3), "head": torch.zeros(3), "cu_seqlens": torch.tensor([0, 4])}
    with pytest.raises(error, match=message):
        q_head_advantages(**arguments | options)
