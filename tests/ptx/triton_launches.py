"""Triton launchers on CPU tensors: what Triton compiles for a GPU is emulated instead of launched.

    install(90)  # from here on, in this process: kernels must not have been decorated for the interpreter
    gae.launch(*tensors, ...)

Every launch runs under SCHEDULES schedules, and all must leave the same bits. `counts` sums the instructions of the
first one by kernel.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import re
import struct
from typing import NamedTuple

import torch
import triton
from recorder import Launch, bind, target
from triton._C.libtriton import ir
from triton.compiler import make_backend
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from qrm_fast import triton as kernels

from .emulator import BUILD, Fault, Kernel

SCHEDULES = int(os.environ.get("EMULATED_SCHEDULES", "2"))
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that one block can have
FORMATS = {"fp32": "f", "fp64": "d", "i1": "?", "i8": "b", "i16": "h", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}


class Machine(NamedTuple):
    kernel: Kernel
    shared_bytes: int
    tensor_maps: list[dict]


class Count(NamedTuple):
    launches: int = 0
    instructions: int = 0


counts: dict[str, Count] = {}
state = {"seed": 0, "capability": 0, "blocks_may_race": False}


def to_ptx(launch: Launch) -> tuple[str, int, list[dict]]:
    """PTX text, bytes of shared memory, and what the tensor maps are like; kept in build/ptx."""
    facts = triton.__version__, launch.kernel.cache_key, launch.key, launch.capability
    path = BUILD / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"
    if not path.exists():
        text, metadata = _compiled(launch)
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps([text, metadata["shared"], metadata.get("tensordesc_meta") or []]))
        partial.rename(path)
    return tuple(json.loads(path.read_text()))


def _compiled(launch: Launch) -> tuple[str, dict]:
    """PTX and the compiler's metadata; no machine code is made of it, which takes most of a compilation."""
    aim = target(launch.capability)
    backend, context = make_backend(aim), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source, stages = launch.source(), {}
    backend.add_stages(stages, launch.options, source.language)
    generators = backend.get_codegen_implementation(launch.options)
    code = source.make_ir(aim, launch.options, generators, backend.get_module_map(), context)
    metadata = {"target": aim, **vars(launch.options)}
    for name, stage in stages.items():
        code = stage(code, metadata)
        if name == "ptx":
            return code, metadata
    raise AssertionError("Triton compiles without PTX")


machines: dict[tuple, Machine] = {}


def _machine(launch: Launch) -> Machine:
    found = machines.get((launch.kernel, launch.key))
    if found is None:
        text, shared_bytes, tensor_maps = to_ptx(launch)
        name = re.search(r"\.entry (\w+)\(", text)[1]
        kernel = Kernel(text, name, contract=launch.options.enable_fp_fusion)
        found = Machine(kernel, shared_bytes, tensor_maps)
        machines[launch.kernel, launch.key] = found
    return found


def _check_limits(launch: Launch, machine: Machine) -> None:
    """What a GPU's driver refuses."""
    if not (0 < launch.grid[0] < 2**31 and 0 < launch.grid[1] < 2**16 and 0 < launch.grid[2] < 2**16):
        raise Fault(f"{launch.kernel.__name__}: there is no grid {launch.grid}")
    if machine.shared_bytes > SHARED_BYTES[launch.capability]:
        raise Fault(f"{launch.kernel.__name__}: there are no {machine.shared_bytes} bytes of shared memory")


def _parameters(launch: Launch, machine: Machine, arguments: dict) -> list[bytes]:
    """The values that Triton's own launcher would pass, a descriptor as cpp/machine.h has it."""
    values, maps = [], iter(machine.tensor_maps)
    for name, kind in launch.signature.items():
        x = arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(x, TensorDescriptor):
            box = next(maps)
            assert x.padding == "zero" and len(x.shape) == 2
            size = x.base.element_size()
            matrix = x.base.data_ptr(), x.shape[1], x.shape[0], x.strides[0] * size
            columns_and_rows = box["block_size"][::-1]
            values.append(struct.pack("<Qqqqiiii", *matrix, *columns_and_rows, size, box["swizzle"]))
            values += [struct.pack("<i", n) for n in x.shape] + [struct.pack("<q", n) for n in x.strides]
        elif isinstance(x, torch.Tensor):
            values.append(struct.pack("<Q", x.data_ptr()))
        else:
            values.append(struct.pack(f"<{FORMATS[kind]}", x))
    return values


def _run(function: JITFunction, *args, grid, warmup, **options) -> None:
    launch, arguments = bind(function, state["capability"], args, grid, options)
    machine = _machine(launch)
    _check_limits(launch, machine)
    parameters = machine.kernel.pack(_parameters(launch, machine, arguments))
    tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in arguments.values()]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}.values()
    memory = [torch.empty(0, dtype=torch.uint8).set_(x) for x in storages]
    before, first = [x.clone() for x in memory], []
    for schedule in range(1 if state["blocks_may_race"] else SCHEDULES):
        if schedule:
            for x, old in zip(memory, before, strict=True):
                x.copy_(old)
        state["seed"] += 1
        threads = 32 * launch.options.num_warps
        instructions = machine.kernel.run(
            *(parameters, launch.grid, threads, machine.shared_bytes, tensors, state["seed"]),
            blocks_may_race=state["blocks_may_race"],
        )
        if schedule == 0:
            first = [x.clone() for x in memory]
            count = counts.get(function.__name__, Count())
            counts[function.__name__] = Count(count.launches + 1, count.instructions + instructions)
        elif not all(map(torch.equal, memory, first)):
            raise Fault(f"{function.__name__}: other bits under another schedule (seed {state['seed']})")


def install(capability: int) -> None:
    """In this process, launches of Triton kernels on CPU tensors are emulated as on such a GPU."""
    state["capability"] = capability
    JITFunction.run = _run
    for file in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{file.name}")
        if hasattr(module, "capability"):
            module.capability = lambda x: capability // 10
