"""The processes that train one model (`torchrun`): which one this is, what they say to each other, shared weights.

Every function is a plain one where there is one process, and a collective one, which all processes must reach, where
there are several.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def connect(device: str) -> None:
    """Join the processes that `torchrun` started, each with a device of its own; nothing where it started none or one.

    Raises ValueError for a device with a number, which all of them would share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    kind, _, number = device.partition(":")
    if number:
        raise ValueError(f"device must be {kind} where torchrun starts several processes, one for each, got {device}")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl")


def disconnect() -> None:
    """Leave, once all processes are here: one that left before might tear down what another waits for.

    A group of one process is not ours: vLLM makes one, and leaves it itself.
    """
    if num_ranks() > 1:
        dist.barrier()
        dist.destroy_process_group()


def is_loss(error: Exception) -> bool:
    """Whether `error` says that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def barrier() -> None:
    if num_ranks() > 1:
        dist.barrier()


def world() -> dist.ProcessGroup | None:
    """The group of all processes, None where there is one."""
    return dist.group.WORLD if num_ranks() > 1 else None


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def share(rows: Sequence[T]) -> list[T]:
    """Every N-th of `rows`, from this process's number on."""
    return list(rows[rank() :: num_ranks()])


def gather(x: Tensor) -> Tensor:
    """[N, ...]: `x` of every process, in their order, so that what is made of it has the same bits on all."""
    if num_ranks() == 1:
        return x[None]
    everyone = x.new_empty(num_ranks(), *x.shape)
    dist.all_gather(list(everyone), x.contiguous())
    return everyone


def mean(x: Tensor, weight: float) -> Tensor:
    """The mean of `x` [K] over the processes, each with its `weight`."""
    if num_ranks() == 1:
        return x
    rows = gather(torch.cat([x, x.new_tensor([weight])]))  # [N, K+1]
    return (rows[:, :-1] * rows[:, -1:]).sum(0) / rows[:, -1].sum()


def gather_objects(x: T) -> list[T]:
    """`x` of every process, in their order."""
    if num_ranks() == 1:
        return [x]
    everyone: list = [None] * num_ranks()
    dist.all_gather_object(everyone, x)
    return everyone


def shard(module: nn.Module) -> None:
    """Share the weights of `module` (FSDP2), layer by layer; gradients are sums over the processes.

    The layers are those that transformers names for this purpose. Every forward and backward pass is then one that all
    processes must make. `module` is changed in place, its parameters are others: an optimiser comes after it.
    """
    if num_ranks() == 1:
        return
    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (num_ranks(),))
    layers = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    parts = [part for part in module.modules() if type(part).__name__ in layers]
    for part in (*parts, module):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        assert isinstance(part, FSDPModule)
        # not the mean over the processes: a loss is divided by what all of them have
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if hasattr(module, "loss"):
        register_fsdp_forward_method(module, "loss")


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights of `module` on every process: what runs inside waits for no other process."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def full(x: Tensor) -> Tensor:
    """`x` as a whole where it is shared, detached."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """The part of `x` that this process holds, detached."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x
