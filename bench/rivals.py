"""Other packages' heads as functions of the same tensors, for who has them installed.

PEERS=DIR makes the wheels of a folder importable without installing them. What cannot be imported is named as absent.
"""

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if "PEERS" in os.environ:
    UNPACKED = tempfile.TemporaryDirectory()  # until this process ends
    for wheel in Path(os.environ["PEERS"]).glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(UNPACKED.name)
    sys.path.append(UNPACKED.name)

os.environ.setdefault("VERL_USE_EXTERNAL_PLUGINS", "none")  # or verl would run the ops of this package

# hidden [T, D], weight [V, D], targets [T] to logprobs [T] and, of most, entropy [T]
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Rival(NamedTuple):
    package: str
    what: str
    load: Callable[[], Callable]  # raises ImportError where the package is not installed


def available(rivals: list[Rival]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that can be imported, by package, version and what they are; and why the others cannot."""
    there, absent = {}, {}
    for package, what, load in rivals:
        try:
            there[f"{package} {version(package)}, {what}"] = load()
        except ImportError as error:
            absent[f"{package}, {what}"] = str(error)
    return there, absent


def trl_chunked() -> Head:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        options = 1.0, columns, None, 1.0, ("entropy",)  # temperature, chunk, softcap, logit scale, outputs
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)
        return logprobs, entropy

    return head


def verl_chunked() -> Head:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()


def verl_triton() -> Head:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, 1.0, "none")


def liger_scaled() -> Head:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        options = 1.0, -100, 1, True  # temperature, ignore_index, tiles per cluster, with entropy
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, *options)
        return -nll, entropy

    return head


def cut_cross_entropy() -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (-linear_cross_entropy(hidden, weight, targets, reduction="none"),)


def liger_grpo() -> Callable[..., Tensor]:
    """The clipped loss of S answers of equal length with one advantage each, its mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
        shape = len(advantages), len(targets) // len(advantages)
        function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=hidden.is_cuda)
        everywhere = torch.ones(shape, dtype=torch.int64, device=hidden.device)
        answers = hidden.view(*shape, -1), weight, targets.view(shape), everywhere, advantages
        return function(*answers, old_per_token_logps=old_logprobs.view(shape))[0]

    return loss


# hidden [T, D], weight [V, D], targets [T] to the sum of -logp: what REINFORCE is where every advantage is 1
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


def quack() -> CrossEntropy:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return partial(chunked_linear_cross_entropy, reduction="sum")


def liger_cross_entropy() -> CrossEntropy:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(liger_fused_linear_cross_entropy, reduction="sum")


HEADS = [
    Rival("trl", "chunked log-prob", trl_chunked),
    Rival("verl", "fused linear", verl_chunked),
    Rival("liger-kernel", "scaled cross entropy", liger_scaled),
]
HEADS_FOR_CUDA = [Rival("verl", "Triton kernel", verl_triton)]
WITHOUT_ENTROPY_FOR_CUDA = [Rival("cut-cross-entropy", "no entropy", cut_cross_entropy)]
CROSS_ENTROPIES_FOR_CUDA = [
    Rival("quack-kernels", "cross entropy: every advantage is 1", quack),
    Rival("liger-kernel", "cross entropy: every advantage is 1", liger_cross_entropy),
]
LOSSES_WITHOUT_ENTROPY = [Rival("liger-kernel", "fused linear GRPO, no entropy", liger_grpo)]


def heads(device: torch.device) -> tuple[dict[str, Head], dict[str, Head], dict[str, str]]:
    """Those that give the entropy too, those that do not, and the absent. A kernel for CUDA is no rival elsewhere."""
    on_cuda = device.type == "cuda"
    both, absent = available(HEADS + HEADS_FOR_CUDA if on_cuda else HEADS)
    alone, more = available(WITHOUT_ENTROPY_FOR_CUDA if on_cuda else [])
    return both, alone, absent | more
