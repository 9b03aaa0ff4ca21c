"""The heads of models that people train, at their width and vocabulary: the step of a policy, beside a library GEMM.

On CPU width and vocabulary are a quarter of the model's. Gemma-2 caps its logits, 30 tanh(z / 30).
"""

from functools import partial

import torch
from torch import Tensor

from qrm_fast import linear_policy_loss

from . import rivals
from .bench_heads import GATED, assert_gradients_exact, inputs, of_logits
from .harness import Case, case, gemm

MODELS = {"Qwen2.5-0.5B": (896, 151936), "Llama-3-8B": (4096, 128256), "Gemma-2-9B": (3584, 256000)}
SOFTCAP = {"Gemma-2-9B": 30.0}


@case(
    cpu=[
        {"model": name, "dtype": "float32", "num_tokens": 512, "dim": d // 4, "vocab": v // 4}
        for name, (d, v) in MODELS.items()
    ],
    cuda=[
        {"model": name, "dtype": "bfloat16", "num_tokens": 8192, "dim": d, "vocab": v}
        for name, (d, v) in MODELS.items()
    ],
)
def model_head(device: torch.device, model: str, dtype: str, **shape: int) -> Case:
    """REINFORCE and its gradients of hidden and weight, in three GEMMs."""
    hidden, weight, targets = inputs(device, getattr(torch, dtype), **shape)
    t, d, v = shape.values()
    softcap = SOFTCAP.get(model)
    advantages = torch.randn(t, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def ours(leaves: tuple[Tensor, ...] = leaves, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        out = linear_policy_loss(*leaves, targets[rows], advantages[rows], kind="reinforce", softcap=softcap)
        return torch.autograd.grad(out.loss, leaves)

    def theirs(leaves: tuple[Tensor, ...] = leaves, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        logits = (leaves[0] @ leaves[1].T).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        loss = -(advantages[rows] * of_logits(logits, targets[rows])[0]).mean()
        return torch.autograd.grad(loss, leaves)

    ways = {"qrm_fast": ours, "logits.float(), log_softmax": theirs}
    on_cuda = device.type == "cuda" and not softcap  # which QuACK's does not have
    scalar, absent = rivals.available(rivals.CROSS_ENTROPIES_FOR_CUDA if on_cuda else [])
    for name, loss in scalar.items():
        ways[name] = lambda loss=loss: torch.autograd.grad(loss(*leaves, targets), leaves)

    def gate() -> None:
        first = partial(ours, rows=GATED), partial(theirs, rows=GATED)
        assert_gradients_exact(*(lambda *x, way=way: way(x) for way in first), hidden[GATED], weight)

    return Case(
        ways,
        gate,
        baseline=gemm(hidden.detach(), weight.detach()),
        num_baselines=3,
        bytes=2 * (t * d + v * d) * hidden.element_size() + 16 * t,
        flops=6 * t * d * v,
        repeats=7,
        absent=absent,
    )
