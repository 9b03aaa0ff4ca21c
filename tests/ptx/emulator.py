"""The emulator of cpp/, compiled on first use into build/ptx."""

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpp"
BUILD = Path(__file__).parents[2] / "build/ptx"
COMMAND = ["c++", "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]
MESSAGE_BYTES = 1024
MOST_BLOCKS = 6  # in flight


class Fault(RuntimeError):
    """What the emulator found wrong with a launch, or does not know."""


def compiled(name: str, inputs: Iterable[Path], compile_to) -> Path:
    """The file build/ptx/NAME of these inputs: `compile_to(path)` makes it where an earlier run has not."""
    digest = hashlib.sha256(repr(COMMAND).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    stem, suffix = name.split(".")
    result = BUILD / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    if not result.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = result.with_name(f"{os.getpid()}-{result.name}")
        compile_to(partial)
        try:
            partial.rename(result)
        except OSError:  # processes that compile at the same time write the same, and a folder replaces none
            if not result.is_dir():
                raise
            shutil.rmtree(partial)
    return result


def _compile(path: Path) -> None:
    objects = {source: path.with_name(f"{path.stem}-{source.stem}.o") for source in SOURCES.glob("*.cpp")}
    running = [subprocess.Popen([*COMMAND, "-c", source, "-o", out]) for source, out in objects.items()]
    if any([process.wait() for process in running]):
        raise RuntimeError("the emulator does not compile")
    subprocess.run([*COMMAND, "-shared", *objects.values(), "-o", path], check=True)
    for out in objects.values():
        out.unlink()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiled("emulator.so", sorted(SOURCES.glob("*")), _compile)))
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.ptx_parse.restype = pointer
    library.ptx_parse.argtypes = [text, text, ctypes.c_int, text]
    library.ptx_num_parameters.argtypes = [pointer]
    library.ptx_parameter_offset.argtypes = library.ptx_parameter_bytes.argtypes = [pointer, ctypes.c_int]
    library.ptx_run.restype = ctypes.c_uint64
    library.ptx_run.argtypes = [pointer, text, pointer, *[ctypes.c_int] * 3, pointer, ctypes.c_int]
    library.ptx_run.argtypes += [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, text]
    return library


def _extents(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int, int]]:
    """The bytes [begin, end) from each tensor's first element to its last, and its element size; overlaps joined."""
    found = []
    for x in tensors:
        if x.numel():
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            found.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), x.element_size()))
    joined: list[tuple[int, int, int]] = []
    for begin, end, size in sorted(found):
        if joined and begin < joined[-1][1]:
            before = joined.pop()
            begin, end, size = before[0], max(end, before[1]), min(size, before[2])
        joined.append((begin, end, size))
    return joined


class Kernel:
    """The entry `name` of PTX text. `contract`: ptxas may fuse products with sums, as it does by default."""

    def __init__(self, text: str, name: str, contract: bool = True):
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        self._kernel = _library().ptx_parse(text.encode(), name.encode(), contract, message)
        if not self._kernel:
            raise Fault(message.value.decode())
        places = range(_library().ptx_num_parameters(self._kernel))
        self.offsets = [_library().ptx_parameter_offset(self._kernel, i) for i in places]
        self.sizes = [_library().ptx_parameter_bytes(self._kernel, i) for i in places]

    def pack(self, values: Iterable[bytes]) -> bytes:
        """The parameters' memory; what is left out is 0."""
        memory = bytearray(max(map(sum, zip(self.offsets, self.sizes, strict=True)), default=0))
        for offset, size, value in zip(self.offsets, self.sizes, values, strict=False):
            assert len(value) <= size, f"a value of {len(value)} bytes for a parameter of {size}"
            memory[offset : offset + len(value)] = value
        return bytes(memory)

    def run(
        self,
        parameters: bytes,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        tensors: Iterable[torch.Tensor],
        seed: int,
        most_steps: int = 0,
        blocks_may_race: bool = False,
        cluster: int = 1,
    ) -> int:
        """Runs a launch that may touch these tensors; returns how many instructions its warps executed."""
        extents = list(itertools.chain(*_extents(tensors)))
        regions = (ctypes.c_uint64 * max(1, len(extents)))(*extents)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        instructions = _library().ptx_run(
            *(self._kernel, parameters, (ctypes.c_int * 3)(*grid), cluster, threads, shared_bytes),
            *(regions, len(extents) // 3, seed, MOST_BLOCKS, most_steps, blocks_may_race, message),
        )
        if message.value:
            raise Fault(f"{message.value.decode()} (seed {seed})")
        return instructions
