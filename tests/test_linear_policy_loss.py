"""linear_policy_loss against log_softmax and policy_loss through autograd, and its promises about masks and bits."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qrm_fast
from qrm_fast import linear_logprobs, linear_policy_loss, policy_loss
from qrm_fast.ops.checks import Checker
from qrm_fast.ops.linear_policy_loss import _forward

# One shape beyond each block size of the CPU kernel: rows per block, columns per slab and per split, depth per pass.
SHAPES = [(0, 5, 7), (1, 3, 1), (2, 8, 17), (63, 20, 127), (450, 13, 1000), (9, 520, 2500), (3, 4, 16500)]
OPTIONS = {
    "on-policy": {"old": False},
    "ppo": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5},
    "reinforce": {"kind": "reinforce", "entropy_coef": 0.02},
    "everything": {"kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.05, "softcap": 6.0, "extra": True},
    "k1": {"kl_coef": 0.1, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2", "kind": "reinforce"},
    "cispo": {"kind": "cispo", "clip_high": 0.1},
    "gspo": {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.05, "extra": True},
    "gspo-on-policy": {"kind": "gspo", "old": False},
    "gspo-dual": {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.05, "dual_clip": 1.1},
    "sapo": {"kind": "sapo", "kl_coef": 0.1, "kl_estimator": "unbiased"},
}


def make(t: int, d: int, v: int, dtype: torch.dtype, *, old=True, extra=False, **options) -> tuple[dict, dict, dict]:
    """Inputs that require grad, constants [T] in float64, and options."""
    generator = torch.Generator().manual_seed(t + d + v)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"hidden": randn(t, d), "weight": randn(v, d) * 3 / d**0.5}
    if extra:
        inputs["bias"] = randn(v)
    inputs = {k: x.to(dtype) for k, x in inputs.items()}
    targets = torch.randint(v, (t,), generator=generator)
    targets[4::9] = -100
    wide = [x.double() for x in inputs.values()]
    near = torch.nn.functional.linear(*wide).log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    constants = {"advantages": randn(t), "ref_logprobs": near + 0.3 * randn(t)}
    if old:
        constants["old_logprobs"] = near + 0.3 * randn(t)
    if extra:
        constants["token_weights"] = torch.rand(t, generator=generator, dtype=torch.float64)
        constants["token_weights"][::5] = 0
        constants["temperature"] = torch.rand(t, generator=generator, dtype=torch.float64) + 0.5
    if options.get("kind") == "gspo":  # empty, many to a block, and longer than a block
        bounds = [0, 0, t // 20, t // 10, t // 10, t // 3, t]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    return inputs, constants, {"targets": targets, **options}


def ours(inputs, constants, options):
    out = linear_policy_loss(**inputs, **constants, **options)
    return out.loss, out.metrics


def naive(inputs, constants, options):
    """log_softmax over materialised logits and policy_loss, in the inputs' dtype. Ignored rows weigh 0."""
    options, constants = dict(options), dict(constants)
    targets, softcap, temperature = (
        options.pop("targets"),
        options.pop("softcap", None),
        constants.pop("temperature", 1),
    )
    z = torch.nn.functional.linear(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)).log_softmax(-1)
    keep = targets != -100
    weights = constants.pop("token_weights", keep.to(z.dtype) / max(1, int(keep.sum())))
    out = policy_loss(
        logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0],
        entropy=-(logp.exp() * logp).sum(-1),
        token_weights=weights.where(keep, 0),
        **constants,
        **options,
    )
    return out.loss, out.metrics


def run(function, inputs, constants, options, dtype):
    """Loss, metrics and gradients of 2 * loss, everything in `dtype`."""
    acc = torch.promote_types(dtype, torch.float32)
    inputs = {k: x.to(dtype).requires_grad_() for k, x in inputs.items()}
    loss, metrics = function(inputs, {k: x.to(acc) for k, x in constants.items()}, options)
    return [loss.detach(), torch.stack(metrics), *torch.autograd.grad(2 * loss, list(inputs.values()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_autograd_in_float32(shape, options, dtype):
    """float64 agrees to 1e-11. Otherwise loss and metrics are within the 2e-5 that the head promises, and gradients, in
    the mean square, as close to float64 as PyTorch's float32 path on the same values: a log-probability's rounding is
    a relative error of its row's coefficient, so a few roundings of the result are granted."""
    inputs, constants, options = make(*shape, dtype, **options)
    result = run(ours, inputs, constants, options, dtype)
    exact = run(naive, inputs, constants, options, torch.float64)
    peer = run(naive, inputs, constants, options, torch.promote_types(dtype, torch.float32))
    for i, (got, want, other) in enumerate(zip(result, exact, peer, strict=True)):
        assert got.shape == want.shape and torch.isfinite(got).all()
        if dtype == torch.float64:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        elif i < 2:
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
        else:
            error, peer_error = ((x.to(got.dtype).double() - want).norm() for x in (got, other))
            scale = max(want.norm(), want.numel() ** 0.5 / max(1, shape[0]))
            assert error <= 1.1 * peer_error + 8 * torch.finfo(got.dtype).eps * scale, f"{error:.3g}, {peer_error:.3g}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_reference_agrees(options):
    """What serves a device without a kernel of its own."""
    inputs, constants, options = make(63, 20, 127, torch.float64, **options)
    temperature = constants.pop("temperature", None)
    rows = [constants.get(k) for k in ("advantages", "old_logprobs", "ref_logprobs", "token_weights")]
    arguments = (
        *(inputs["hidden"], inputs["weight"], options["targets"], *rows, options.get("cu_seqlens")),
        *(inputs.get("bias"), 1.0, temperature, options.get("softcap"), -100, options.get("kind", "ppo")),
        *(options.get("clip_low", 0.2), options.get("clip_high", 0.2), options.get("dual_clip", float("inf"))),
        *(options.get("kl_coef", 0.0), options.get("kl_estimator", "k3"), options.get("entropy_coef", 0.0)),
        *(True, True, "bias" in inputs),
    )
    for got, want in zip(_forward(*arguments), _forward._init_fn(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "cispo", "gspo", "sapo"])
def test_same_as_its_two_parts(kind):
    """The very bits of linear_logprobs in logprobs and entropy; loss and metrics as policy_loss gives them."""
    inputs, constants, options = make(300, 24, 700, torch.float32, kind=kind, kl_coef=0.1, entropy_coef=0.01)
    constants = {k: x.float() for k, x in constants.items()}
    out = linear_policy_loss(**inputs, **constants, **options)
    head = linear_logprobs(**inputs, targets=options.pop("targets"))
    keep = (out.logprobs != 0).float()
    parts = policy_loss(head.logprobs, entropy=head.entropy, token_weights=keep / keep.sum(), **constants, **options)
    assert torch.equal(out.logprobs, head.logprobs) and torch.equal(out.entropy, head.entropy)
    torch.testing.assert_close(out.loss, parts.loss)
    torch.testing.assert_close(torch.stack(out.metrics), torch.stack(parts.metrics))


LARGE = [(3, 5, v) for v in (2, 1100, 1280, 2176, 32000, 50257, 151936, 152064)] + [(65537, 2, 17)]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_sizes(shape):
    """Beyond many slabs of columns or blocks of rows, as autograd in float64."""
    inputs, constants, options = make(*shape, torch.float64)
    for got, want in zip(
        run(ours, inputs, constants, options, torch.float32),
        run(naive, inputs, constants, options, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_micro_batches_add_up():
    """Weights with a global denominator: the parts' losses, gradients and metrics sum to the whole's."""
    inputs, constants, options = make(200, 16, 90, torch.float64, extra=True)
    targets = options.pop("targets")

    def step(rows):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        chosen = {**leaves, "hidden": leaves["hidden"][rows]}
        out = linear_policy_loss(
            **chosen, targets=targets[rows], **{k: x[rows] for k, x in constants.items()}, **options
        )
        return [out.loss, torch.stack(out.metrics[:-1]), *torch.autograd.grad(out.loss, list(leaves.values()))]

    whole = step(slice(None))
    parts = [step(slice(0, 70)), step(slice(70, 71)), step(slice(71, 200))]
    for x, *pieces in zip(whole, *parts, strict=True):
        torch.testing.assert_close(x, sum(pieces))


def test_idle_rows_are_never_read():
    """Rows that are ignored or weigh 0 may hold NaN anywhere; their logprobs, entropy and gradients are 0."""
    inputs, constants, options = make(12, 8, 50, torch.float32)
    constants = {k: x.float() for k, x in constants.items()}
    constants["token_weights"] = torch.full((12,), 0.1)
    idle = torch.tensor([0, 1, 4, 7])
    options["targets"][[0, 4]] = -100
    constants["token_weights"][[1, 7]] = 0
    clean = run(ours, {k: x.clone() for k, x in inputs.items()}, constants, options, torch.float32)
    poisoned = [inputs["hidden"], constants["advantages"], constants["old_logprobs"], constants["ref_logprobs"]]
    for x in poisoned:
        x[idle] = torch.nan
    for x, y in zip(clean, run(ours, inputs, constants, options, torch.float32), strict=True):
        assert torch.equal(x, y)
    out = linear_policy_loss(**inputs, **constants, **options)
    assert torch.equal(out.logprobs[idle], torch.zeros(4)) and torch.equal(out.entropy[idle], torch.zeros(4))


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_non_finite_rows_stay_alone(kind):
    """NaN in the loss and in their own rows (gspo: their own sequence); no other row changes by a bit."""
    inputs, constants, options = make(60, 8, 50, torch.float32, kind=kind, entropy_coef=0.1)
    constants = {k: x.float() for k, x in constants.items()}
    options["targets"][4::9] = 7

    def rows(hidden):
        leaf = hidden.clone().requires_grad_()
        out = linear_policy_loss(leaf, inputs["weight"], **constants, **options)
        return out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaf)

    dirty = inputs["hidden"].clone()
    dirty[8], dirty[15] = torch.nan, torch.inf
    bad = torch.zeros(60, dtype=torch.bool)
    bad[[8, 15]] = True
    *clean, clean_gradient = rows(inputs["hidden"])
    *got, gradient = rows(dirty)
    for x, y in zip(clean, got, strict=True):
        assert torch.equal(x[~bad], y[~bad]) and y[bad].isnan().all()
    if kind == "gspo":
        bad[6:20] = True  # both sequences, of rows 6 to 19: see `make`
        bad[:6] = bad[20:] = False
    assert torch.equal(clean_gradient[~bad], gradient[~bad]) and gradient[bad].isnan().any(1).all()


@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_large_logits(level):
    """All logits near +-100, one of them 90 above the others: as exact as elsewhere."""
    inputs, constants, options = make(5, 4, 1100, torch.float32, extra=True, entropy_coef=0.1)
    inputs["weight"] /= 100
    inputs["bias"] = level + torch.rand(1100, generator=torch.Generator().manual_seed(0))
    inputs["bias"][7] += 90
    options["targets"] = torch.tensor([7, 7, 8, 9, 7])
    exact = torch.nn.functional.linear(*(x.double() for x in inputs.values()))
    exact = (exact / constants["temperature"][:, None]).log_softmax(-1).gather(-1, options["targets"][:, None])[:, 0]
    constants["old_logprobs"] = constants["ref_logprobs"] = exact + 0.1
    got, want = (run(f, inputs, constants, options, to) for f, to in ((ours, torch.float32), (naive, torch.float64)))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


def test_tied_weight_and_strided_rows():
    """A weight that is the embedding too gets both gradients; rows with a gap between them give the same bits."""
    inputs, constants, options = make(40, 12, 100, torch.float64)
    ids = torch.arange(40) % 100

    def tied(function, dtype):
        weight = inputs["weight"].to(dtype).requires_grad_()
        wide = torch.full((40, 2, 12), torch.nan, dtype=dtype)
        wide[:, 0] = weight[ids]
        typed = {k: x.to(dtype) for k, x in constants.items()}
        gradients = []
        for hidden in weight[ids], wide[:, 0]:
            gradients += torch.autograd.grad(function({"hidden": hidden, "weight": weight}, typed, options)[0], weight)
        return gradients

    dense, strided = tied(ours, torch.float32)
    assert torch.equal(dense, strided)
    torch.testing.assert_close(dense.double(), tied(naive, torch.float64)[0], rtol=1e-4, atol=1e-6)


def test_more_than_2_31_logits():
    """T * V = 2^16 * 2^15 and more; all but the first and the last rows are ignored."""
    hidden, weight, advantages = torch.randn(65537, 3), torch.randn(32800, 3), torch.randn(65537)
    rows = torch.cat([torch.arange(50), torch.arange(65487, 65537)])
    targets = torch.full((65537,), -100).index_fill(0, rows, 32799)
    constants, some = {"advantages": advantages}, {"advantages": advantages[rows]}
    loss, metrics, dx, dw = run(
        ours, {"hidden": hidden, "weight": weight}, constants, {"targets": targets}, torch.float32
    )
    want = run(ours, {"hidden": hidden[rows], "weight": weight}, some, {"targets": targets[rows]}, torch.float32)
    torch.testing.assert_close((loss, metrics, dx[rows], dw), tuple(want))
    assert (dx[50:65487] == 0).all()


def test_later_calls_of_other_shapes_change_nothing():
    first, other = make(63, 20, 1000, torch.float32), make(450, 8, 2500, torch.bfloat16, **OPTIONS["gspo"])
    want = run(ours, *first, torch.float32)
    run(ours, *other, torch.bfloat16)
    for x, y in zip(want, run(ours, *first, torch.float32), strict=True):
        assert torch.equal(x, y)


@pytest.mark.unpoisoned
def test_bits():
    """Twice the same bits; a row's logprob and hidden gradient do not depend on its neighbours or the threads."""
    inputs, constants, options = make(700, 24, 1500, torch.float32)
    constants = {k: x.float() for k, x in constants.items()} | {"token_weights": torch.full((700,), 0.01)}
    targets = options.pop("targets")

    def rows(index):
        hidden = inputs["hidden"][index].clone().requires_grad_()
        weight = inputs["weight"].clone().requires_grad_()
        out = linear_policy_loss(hidden, weight, targets[index], **{k: x[index] for k, x in constants.items()})
        return out.loss, out.logprobs, *torch.autograd.grad(out.loss, [hidden, weight])

    everything = rows(torch.arange(700))
    assert all(torch.equal(x, y) for x, y in zip(everything, rows(torch.arange(700)), strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for index in (torch.randperm(700), torch.arange(333, 400)):
        _, logprobs, hidden_grad, _ = rows(index)
        assert torch.equal(logprobs, everything[1][index]) and torch.equal(hidden_grad, everything[2][index])
    torch.set_num_threads(threads)


@pytest.mark.unpoisoned
def test_bits_of_gspo_depend_on_the_sequence_alone():
    """Packed or one by one; longer than a block of rows, whose logits are formed twice, or shorter."""
    inputs, constants, options = make(700, 8, 100, torch.float32, kind="gspo")
    constants = {k: x.float() for k, x in constants.items()} | {"token_weights": torch.full((700,), 0.01)}
    targets = options.pop("targets")

    def gradient(bos, eos, bounds):
        hidden = inputs["hidden"][bos:eos].clone().requires_grad_()
        rows = {k: x[bos:eos] for k, x in constants.items()}
        out = linear_policy_loss(
            hidden, inputs["weight"], targets[bos:eos], **rows, kind="gspo", cu_seqlens=torch.tensor(bounds)
        )
        return torch.autograd.grad(out.loss, hidden)[0]

    bounds = options["cu_seqlens"].tolist()
    whole = gradient(0, 700, bounds)
    for bos, eos in itertools.pairwise(bounds):
        assert torch.equal(gradient(bos, eos, [0, eos - bos]), whole[bos:eos])


def test_only_needed_gradients_are_formed():
    inputs, constants, options = make(20, 8, 30, torch.float32)
    constants = {k: x.float() for k, x in constants.items()}
    frozen = linear_policy_loss(inputs["hidden"].requires_grad_(), inputs["weight"], **constants, **options)
    frozen.loss.backward()
    assert inputs["weight"].grad is None and (inputs["hidden"].grad != 0).any()
    with torch.no_grad():
        assert not linear_policy_loss(**inputs, **constants, **options).loss.requires_grad
    out = linear_policy_loss(**inputs, **constants, **options)
    assert not (out.logprobs.requires_grad or out.entropy.requires_grad or out.metrics.ratio.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradient_and_kept_graph(dtype):
    """A gradient is scaled in place on the last walk of the graph alone, and never differentiated in silence."""
    inputs, constants, options = make(20, 8, 30, dtype)
    constants = {k: x.float() for k, x in constants.items()}
    leaves = tuple(x.requires_grad_() for x in inputs.values())

    def loss():
        return linear_policy_loss(**inputs, **constants, **options).loss

    once = torch.autograd.grad(loss(), leaves)
    graph = loss()
    for scale in (-2.0, 0.5, 4.0):
        walked = torch.autograd.grad(scale * graph, leaves, retain_graph=scale != 4.0)
        assert all(torch.equal(x, scale * y) for x, y in zip(walked, once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(graph, leaves)
    for retain in (True, False):
        first = torch.autograd.grad(loss(), leaves, create_graph=True, retain_graph=retain)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            torch.autograd.grad(first[1].float().sum(), leaves)


def test_registration():
    inputs, constants, options = make(7, 5, 11, torch.float32, extra=True)
    hidden, weight, bias = (x.requires_grad_() for x in inputs.values())
    old, ref, a, w = (constants[k].float() for k in ("old_logprobs", "ref_logprobs", "advantages", "token_weights"))
    a = -a.abs()  # a positive loss: opcheck differentiates its magnitude, and compares outputs that are then scaled
    head = (bias, 0.7, None, 3.0, -100)
    for needs in [(True, True, True), (True, False, False)]:
        leaves = [x if need else x.detach() for x, need in zip((hidden, weight, bias), needs, strict=True)]
        arguments = (*leaves[:2], options["targets"], a, old, ref, w, None, leaves[2], *head[1:], "ppo", 0.2, 0.2, 3.0)
        torch.library.opcheck(_forward, (*arguments, 0.1, "k3", 0.01, *needs))


def test_gradcheck():
    inputs, constants, options = make(
        6, 4, 9, torch.float64, extra=True, kl_coef=0.2, kl_estimator="k2", entropy_coef=0.1, softcap=5.0
    )
    leaves = [x.requires_grad_() for x in inputs.values()]

    def loss(*leaves):
        return linear_policy_loss(**dict(zip(inputs, leaves, strict=True)), **constants, **options).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_compiles_without_breaks_for_any_length():
    @torch.compile(fullgraph=True, dynamic=True)
    def step(hidden, weight, targets, advantages, old_logprobs):
        return linear_policy_loss(hidden, weight, targets, advantages, old_logprobs=old_logprobs, entropy_coef=0.1).loss

    for t in (12, 30):
        inputs, constants, options = make(t, 8, 40, torch.float32)
        arguments = options["targets"], constants["advantages"].float(), constants["old_logprobs"].float()
        eager, compiled = (inputs["hidden"].clone().requires_grad_() for _ in range(2))
        linear_policy_loss(
            eager, inputs["weight"], *arguments[:2], old_logprobs=arguments[2], entropy_coef=0.1
        ).loss.backward()
        step(compiled, inputs["weight"], *arguments).backward()
        torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 3, 1)}, ValueError, r"hidden must be \[T, D\]"),
        ({"targets": torch.tensor([0, 1, 9, 2])}, ValueError, r"targets must be in \[0, 5\) or -100, got 9 at row 2"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must be \[T\] float32 with T = 4, got \[3\]"),
        ({"advantages": None}, TypeError, "advantages must be a tensor"),
        ({"old_logprobs": torch.zeros(4).bfloat16()}, TypeError, "old_logprobs must be .*float32"),
        ({"advantages": torch.zeros(4, requires_grad=True)}, ValueError, "advantages must not require grad"),
        ({"kind": "trpo"}, ValueError, "kind must be one of ppo, reinforce, cispo, gspo, sapo, got 'trpo'"),
        ({"kind": "gspo"}, ValueError, "cu_seqlens belong to kind 'gspo' .*, got kind 'gspo' without them"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "got kind 'ppo' with them"),
        ({"kind": "gspo", "cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens must end at .* 4, got 3"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef needs ref_logprobs"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 1, 2, -100]),
        "advantages": torch.zeros(4),
    }
    with pytest.raises(error, match=message):
        linear_policy_loss(**(arguments | change))


def test_nothing_is_checked_twice(monkeypatch):
    checked, check = [], Checker.__call__

    def noted(self, name, *rest, **options):
        checked.append(name)
        check(self, name, *rest, **options)

    monkeypatch.setattr(Checker, "__call__", noted)
    per_row = dict.fromkeys(("old_logprobs", "ref_logprobs", "token_weights"), torch.zeros(4))
    linear_policy_loss(torch.zeros(4, 3), torch.zeros(5, 3), torch.arange(4), torch.zeros(4), **per_row)
    assert sorted(checked) == sorted({"hidden", "weight", "targets", "advantages", *per_row})
    checked.clear()
    policy_loss(torch.zeros(4), torch.zeros(4), **per_row)
    assert sorted(checked) == sorted({"logprobs", "advantages", *per_row})


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "cispo", "gspo"])
@pytest.mark.parametrize("old", [-130.0, 130.0])
def test_an_advantage_of_zero_gives_zero_whatever_the_ratio(kind, old):
    hidden, weight = torch.zeros(4, 8, requires_grad=True), torch.zeros(50, 8, requires_grad=True)  # a uniform head
    options = dict(old_logprobs=torch.full((4,), old), kind=kind)
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 1, 4])
    out = linear_policy_loss(hidden, weight, torch.arange(4), torch.zeros(4), **options)
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.loss == 0 and all((x == 0).all() for x in gradients)
    assert all(x.isfinite() for x in out.metrics)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    """The op is computed again in the backward pass: the same gradients."""
    inputs, constants, options = make(20, 8, 30, torch.float32)
    constants = {k: x.float() for k, x in constants.items()}
    leaves = tuple(x.requires_grad_() for x in inputs.values())

    def loss(*leaves):
        return linear_policy_loss(**dict(zip(inputs, leaves, strict=True)), **constants, **options).loss

    plain = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, plain, strict=True))


@pytest.mark.parametrize("op", ["linear_logprobs", "gather_logprobs", "policy_loss", "token_q", "value_loss"])
def test_other_ops_under_activation_checkpointing(op):
    x = torch.randn(5, 8, requires_grad=True)
    targets = torch.arange(5)
    run = {
        "linear_logprobs": lambda x: qrm_fast.linear_logprobs(x, torch.eye(8), targets).logprobs.sum(),
        "gather_logprobs": lambda x: qrm_fast.gather_logprobs(x, targets).logprobs.sum(),
        "policy_loss": lambda x: qrm_fast.policy_loss(x[:, 0].contiguous(), torch.ones(5)).loss,
        "token_q": lambda x: qrm_fast.token_q(x, torch.ones(8)).sum(),
        "value_loss": lambda x: qrm_fast.value_loss(x[:, 0].contiguous(), torch.ones(5)),
    }[op]
    (plain,) = torch.autograd.grad(run(x), x)
    checkpoint(run, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, plain)
