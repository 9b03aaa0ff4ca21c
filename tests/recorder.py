"""The kernel launches that Triton launchers make, recorded for a GPU that is not here and without running a kernel.

    with recording(90) as launches:
        gae.launch(*tensors, ...)  # tensors made here are on the meta device

What is recorded is what Triton would compile: its own binder decides which sizes are 1 or multiples of 16, which
pointers lie at multiples of 16 bytes (a meta tensor's address is its offset), what is None or a descriptor.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction, jit


class Launch(NamedTuple):
    kernel: JITFunction
    capability: int  # of the GPU: 80, 90, ...
    signature: dict[str, str]  # by argument: a type, or "constexpr" for what `constants` has
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: object  # num_warps, num_stages, ... with their defaults
    key: str  # Triton compiles two launches of a kernel alike if they have the same
    grid: tuple[int, int, int]

    @property
    def module(self) -> str:
        return self.kernel.fn.__module__

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


def target(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


@functools.cache
def _binder(kernel: JITFunction, capability: int):
    backend = make_backend(target(capability))
    return backend, jit.create_function_from_signature(kernel.signature, kernel.params, backend)


def bind(kernel: JITFunction, capability: int, args: tuple, grid: tuple, options: dict) -> tuple[Launch, dict]:
    """A launch, and its arguments by name."""
    backend, binder = _binder(kernel, capability)
    options = {**options, "debug": False}
    bound, specialization, rest = binder(*args, **options)
    parsed, *parts = kernel._pack_args(backend, options, bound, specialization, rest)
    key = jit.compute_cache_key({}, specialization, rest)
    return Launch(kernel, capability, *parts, parsed, key, (*grid, 1, 1)[:3]), bound


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """A list that receives the launches made in this block; factories of tensors give meta tensors in it."""
    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **options):
        launches.append(bind(kernel, capability, args, grid, options)[0])

    with (
        torch.device("meta"),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
    ):
        yield launches


def specialisations(launches: list[Launch]) -> list[Launch]:
    """What Triton would compile, each with the largest extents of its grids."""
    found: dict[tuple, Launch] = {}
    for launch in launches:
        known = found.setdefault((launch.kernel, launch.capability, launch.key), launch)
        found[launch.kernel, launch.capability, launch.key] = known._replace(
            grid=tuple(map(max, known.grid, launch.grid))
        )
    return list(found.values())
