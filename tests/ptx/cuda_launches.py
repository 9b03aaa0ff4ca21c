"""The CUDA C++ kernels on CPU tensors: the launchers of csrc/cuda as they are, the PTX that nvcc makes of the kernels.

launched("gae", seed, columns, ...)  # the op's arguments
instructions_per_row("gae", 256)     # of its scan kernel
install()                            # launchers of heads on CPU tensors use those of Hopper
"""

import ctypes
import functools
import importlib.util
import re
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

import qrm_fast  # noqa: F401  defines the ops
from qrm_fast.ops import hopper

from . import triton_launches
from .emulator import COMMAND, Fault, Kernel, compiled

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc/cuda"
RUNTIME = Path(__file__).parent / "cuda_runtime.cpp"
LAUNCH = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.POINTER(ctypes.c_uint)),
    *(ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),
)
counts: dict[str, int] = {}  # instructions of each kernel
COLUMNS = {"gae": 2, "discounted_returns": 1, "min_gae": 2, "vtrace": 3}
OPTIONS = {"gae": (0.99, 0.95, None), "discounted_returns": (0.99,), "min_gae": (0.95,), "vtrace": (0.99, 0.95, 1, 1)}


def _setup():
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def _compile(folder: Path) -> None:
    """One translation unit of all kernels, as PTX (kernels.ptx) and with its host code in a library (kernels.so)."""
    folder.mkdir()
    source, host, runtime = folder / "kernels.cu", folder / "kernels.o", folder / "runtime.o"
    source.write_text("".join(f'#include "{path}"\n' for path in sorted(CUDA.glob("*.cu"))))
    setup = _setup()
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    options = [option for option in setup.NVCC if "-gencode" not in option]
    options += [*COMMON_NVCC_FLAGS, "-gencode=arch=compute_90a,code=compute_90a", *includes]
    command = ["nvcc", "-c", source, "-o", host, "--keep", "--keep-dir", folder, "-Xcompiler", "-fPIC", *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    subprocess.run([*COMMAND, "-c", RUNTIME, "-o", runtime], check=True)
    libraries = Path(torch.__file__).parent / "lib"
    link = ["c++", "-shared", host, runtime, "-o", folder / "kernels.so", "-Wl,-Bsymbolic"]
    subprocess.run([*link, f"-L{libraries}", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{libraries}"], check=True)


@functools.cache
def _kernels() -> tuple[ctypes.CDLL, str]:
    sources = [s for s in sorted((ROOT / "csrc").rglob("*.[hc]*")) if s.is_file() and "cpu" not in s.parts]
    folder = compiled("kernels.built", [RUNTIME, *sources], _compile)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    return library, (folder / "kernels.ptx").read_text()


def _entry(module: str, name: str) -> str:
    """The kernel's text behind the memory that it shares with the module."""
    text = re.search(rf"\.entry {name}\(.*?^}}", module, re.DOTALL | re.MULTILINE)[0]
    outside = re.findall(r"^\.extern \.shared .* (\w+)\[\];", module, re.MULTILINE)
    return "".join(f".extern .shared .align 16 .b8 {x}[];\n" for x in outside if x in text) + text


class _Allocations(TorchDispatchMode):
    """Holds on to the tensors that a launcher makes, which are the memory its kernels may use."""

    def __init__(self):
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.tensors.append(result)
        return result


def launched(op: str, seed: int, *args, mutation: Callable[[str], str] = str) -> tuple[torch.Tensor, ...]:
    """What the op's CUDA kernels return for these arguments, in the order of its schema; nothing where they write.

    `mutation` changes the text of each kernel.
    """
    library, module = _kernels()
    allocations, faults = _Allocations(), []

    def launch(name, grid, cluster, block, shared_bytes, values):
        try:
            kernel = _kernel(mutation(_entry(module, name.decode())), name.decode())
            parameters = kernel.pack(ctypes.string_at(values[i], size) for i, size in enumerate(kernel.sizes))
            tensors = [x for x in (*args, *allocations.tensors) if isinstance(x, torch.Tensor)]
            assert block[1] == block[2] == 1
            done = kernel.run(parameters, tuple(grid[:3]), block[0], shared_bytes, tensors, seed, cluster=cluster)
            counts[name.decode()] = counts.get(name.decode(), 0) + done
            return 0
        except Exception as fault:
            faults.append(fault)
            return 1

    callback = LAUNCH(launch)
    library.emulate_launches(callback)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        with allocations:
            results = getattr(torch.ops.qrm_fast, op).default.redispatch(keys, *args)
    except RuntimeError:
        if faults:
            raise faults[0] from None
        raise
    return results if isinstance(results, tuple) else (() if results is None else (results,))


def install() -> None:
    """In this process, where Triton launches are emulated, too, csrc/cuda serves the steps of heads for CPU tensors.

    Under SCHEDULES schedules, which must leave the same bits.
    """

    def emulated(op: str, *args):
        schema = getattr(torch.ops.qrm_fast, op).default._schema
        written = [x for x, a in zip(args, schema.arguments, strict=True) if a.is_write and x is not None]
        before, seen = [x.clone() for x in written], set()
        for _ in range(triton_launches.SCHEDULES):
            for x, old in zip(written, before, strict=True):
                x.copy_(old)
            triton_launches.state["seed"] += 1
            launched(op, triton_launches.state["seed"], *args)
            seen.add(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in written))
        if len(seen) > 1:
            raise Fault(f"{op}: other bits under another schedule (seed {triton_launches.state['seed']})")

    for op in hopper.SCHEMAS:
        torch.library.impl(f"qrm_fast::{op}", "CPU", functools.partial(emulated, op))


def instructions_per_row(op: str, num_rows: int | Sequence[int], num_tokens: int = 1 << 14) -> float:
    """Of a thread, without a mask, in sequences of `num_rows`, or of these in turn; the last one ends where rows do.

    The setup, which no row needs, is left out.
    """
    counts.clear()
    lengths = torch.tensor(num_rows).reshape(-1)
    ends = lengths.repeat(num_tokens // int(lengths.sum()) + 1).cumsum(0)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), ends[ends < num_tokens], torch.tensor([num_tokens])])
    launched(op, 0, *torch.randn(COLUMNS[op], num_tokens), cu, *OPTIONS[op], None, None)
    return 32 * sum(n for name, n in counts.items() if "scan_units" in name) / num_tokens


@functools.lru_cache(32)
def _kernel(text: str, name: str) -> Kernel:
    return Kernel(text, name)
