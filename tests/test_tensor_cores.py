"""How exact heads of 16-bit inputs are where tensor cores multiply: accumulators that are truncated, not rounded.

On a GPU as it is; without one the interpreter's product truncates as tensor cores do, and so does that of the peer.
"""

import numpy as np
import pytest
import torch
from accuracy import assert_as_tensor_cores, head_limit
from interpreter import widened
from test_linear_logprobs import of_logits
from triton.runtime import interpreter

from qrm_fast.triton import linear_logprobs as kernels
from qrm_fast.triton import linear_q_values as q_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # rows past the last
]
STEP = 16  # products that a tensor core adds to an accumulator at a time
DEPTH, VOCAB = 3584, 500


def towards_zero(x: np.ndarray) -> np.ndarray:
    rounded = x.astype(np.float32)
    return np.where(np.abs(rounded.astype(np.float64)) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)


def nearest(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def accumulated(a: np.ndarray, b: np.ndarray, total: np.ndarray, rounded) -> np.ndarray:
    """total + a @ b in float32, `rounded` after every STEP of the depth."""
    for i in range(0, a.shape[1], STEP):
        part = a[:, i : i + STEP].astype(np.float64) @ b[i : i + STEP].astype(np.float64)
        total = rounded(total.astype(np.float64) + part)
    return total


def problem(largest: float, num_rows: int = 16):
    """hidden, weight in bfloat16 with logits up to about `largest`, targets, the logits in float64."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_rows, DEPTH, generator=generator).bfloat16()
    weight = (torch.randn(VOCAB, DEPTH, generator=generator) * (largest / 4 / DEPTH**0.5)).bfloat16()
    z = hidden.double() @ weight.double().T
    return hidden, weight, torch.randint(VOCAB, (num_rows,), generator=generator), z


def product(hidden: torch.Tensor, weight: torch.Tensor, rounded=towards_zero) -> torch.Tensor:
    """The logits in float32 by tensor cores, or by what imitates them."""
    if torch.cuda.is_available():
        return torch.mm(hidden.cuda(), weight.cuda().T, out_dtype=torch.float32).cpu()
    a, b = hidden.float().numpy(), weight.float().numpy().T
    return torch.from_numpy(accumulated(a, b, np.zeros((len(hidden), len(weight)), np.float32), rounded))


@pytest.fixture
def tensor_cores(triton_device, monkeypatch):
    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(accumulated(widened(a), widened(b), d.data, towards_zero), d.dtype.scalar)

    if triton_device == "cpu":
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return triton_device


def test_the_limit_is_that_of_truncation():
    """Logits of 20 at the depth of a 7B model: truncation alone leaves 2e-5, rounding stays far inside it."""
    hidden, weight, targets, z = problem(20.0)
    a, b = hidden.float().numpy(), weight.float().numpy().T
    start = np.zeros(z.shape, np.float32)
    truncated, rounded = (torch.from_numpy(accumulated(a, b, start, how)).double() for how in (towards_zero, nearest))
    exact, limit = of_logits(z, targets), head_limit(DEPTH, z.abs().max().item())
    for got, want in zip(of_logits(truncated, targets), exact, strict=True):
        assert (got - want).abs().max() <= limit
    (logprobs, *_), (nearer, *_) = of_logits(truncated, targets), of_logits(rounded, targets)
    assert (logprobs - exact[0]).abs().max() > 2e-5 and (nearer - exact[0]).abs().max() < 2e-5
    for tight in 2e-5, limit / 8:
        with pytest.raises(AssertionError, match="off by"):
            assert_as_tensor_cores(truncated, z, rounded, tight)


@pytest.mark.parametrize("largest", [1.0, 20.0])
def test_logprobs_at_the_depth_of_models(tensor_cores, largest):
    hidden, weight, targets, z = problem(largest)
    results = kernels.forward(*(x.to(tensor_cores) for x in (hidden, weight, targets)), None, 1.0, None, None, -100)
    peer, limit = of_logits(product(hidden, weight), targets), head_limit(DEPTH, z.abs().max().item())
    for got, want, other in zip(results, of_logits(z, targets), peer, strict=False):
        assert_as_tensor_cores(got.cpu(), want, other, limit)


def test_q_values_at_the_depth_of_models(tensor_cores):
    """The policy's fields and those of the critic, whose targets' Q is a bare product."""
    hidden, weight, targets, z = problem(20.0)
    inputs = [x.to(tensor_cores) for x in (hidden, weight, hidden.flip(0), weight, targets)]
    logprobs, entropy, q, expected_q, soft_value = (x.cpu() for x in q_kernels.forward(*inputs, 1.0, None, 1.0, -100))
    wide, narrow = ((x, x.flip(0)) for x in (z, product(hidden, weight)))
    fields = []
    for policy, critic in wide, narrow:
        taken = critic.gather(-1, targets[:, None])[:, 0]
        expected = (policy.softmax(-1) * critic).sum(-1)
        fields.append((*of_logits(policy, targets)[:2], taken, expected, critic.logsumexp(-1)))
    limit = head_limit(DEPTH, z.abs().max().item())
    for got, want, other in zip((logprobs, entropy, q, expected_q, soft_value), *fields, strict=True):
        assert_as_tensor_cores(got, want, other, limit)
