"""How time and memory grow with tokens, vocabulary and sequences: cases that differ in one number at a time."""

from dataclasses import replace

import torch

from .bench_advantages import packed
from .bench_heads import linear_policy_loss_forward_backward
from .harness import KEPT_MEMORY, Case, case

BESIDE = "log_softmax, gather, entropy"


def shapes(dtype: str, dim: int, tokens: list[int], vocab: list[int], num_tokens: int) -> list[dict]:
    """Along `tokens` at the largest vocabulary, and along `vocab` at `num_tokens`."""
    both = dict.fromkeys([(t, max(vocab)) for t in tokens] + [(num_tokens, v) for v in vocab])
    return [{"dtype": dtype, "num_tokens": t, "dim": dim, "vocab": v} for t, v in both]


@case(
    cpu=shapes("float32", 256, [256, 512, 1024, 2048, 4096], [4096, 8192, 16384, 32768], 1024),
    cuda=shapes("bfloat16", 3584, [1024, 4096, 8192, 16384], [32000, 76032, 152064], 8192),
)
def growth_of_policy_loss(device: torch.device, dtype: str, **shape: int) -> Case:
    """linear_policy_loss and its gradients, beside logits and autograd."""
    built = linear_policy_loss_forward_backward(device, dtype, **shape)
    providers = {way: built.providers[way] for way in ("qrm_fast", BESIDE)}
    return replace(built, providers=providers, error=None, absent={}, repeats=5)


TOKENS, SEQUENCES = [1 << n for n in (16, 18, 20, 22, 24)], [1 << n for n in (0, 6, 12, 18)]
SCANS = [{"num_tokens": t, "num_sequences": 64} for t in TOKENS]
SCANS += [{"num_tokens": 1 << 22, "num_sequences": s} for s in SEQUENCES if s != 64]


@case(environment=KEPT_MEMORY, cpu=SCANS)
@case(cuda=SCANS)
def growth_of_gae(device: torch.device, num_tokens: int, num_sequences: int) -> Case:
    """On CPU in memory that the process keeps: fresh pages cost more than the scan."""
    return packed(device, f"{num_sequences} x {num_tokens // num_sequences}", num_tokens)
