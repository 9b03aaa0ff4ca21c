"""Compile Triton kernels for GPUs that are not here: `python tests/aot.py 80,90 MODULE_OR_FILE...`, JSON out.

A process of its own, because the tests run with the interpreter on and Triton decides that at decoration; it compiles
on every core. A module lists its kernels, one entry per configuration it launches:

    AOT = [(kernel, {"x_ptr": "*bf16", "num_rows": "i32"}, {"BT": 64}, num_warps, wants_dot)]

Triton takes a size of 1 as a constant: its front end is asked once more about every kernel with sizes of 1. In place of
`num_warps` may stand all compile options, {"num_warps": 8, "num_stages": 4}; a sixth member names the only
architecture that runs the configuration. A dimension whose multiples of 16 matter is written "i32:16".
"""

import ast
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b"}


def load(name: str):
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unlisted(module) -> list[str]:
    """Jitted functions of the module that neither AOT lists nor another jitted function calls."""
    jitted = {name: f for name, f in vars(module).items() if isinstance(f, triton.runtime.JITFunction)}
    own = {name: f for name, f in jitted.items() if f.fn.__module__ == module.__name__}
    called = set()
    for f in own.values():
        tree = ast.parse(inspect.getsource(f.fn).lstrip())
        called |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    listed = {entry[0].__name__ for entry in module.AOT}
    return sorted(own.keys() - listed - called)


class Entry(NamedTuple):
    """What one member of AOT asks of one architecture."""

    module: str
    place: int
    capability: int


MODULES: dict = {}  # by name; the processes that compile are forked with it


def parts(entry: Entry) -> tuple:
    """Kernel, types, constants, compile options and whether a dot is meant."""
    kernel, types, constants, options, wants_dot, *_ = MODULES[entry.module].AOT[entry.place]
    return kernel, types, constants, options if isinstance(options, dict) else {"num_warps": options}, wants_dot


def source(kernel, types: dict, constants: dict) -> ASTSource:
    """Pointers are aligned to 16 bytes, as PyTorch's allocations are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name].removesuffix(":16") for name in names}
    return ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or (signature[name] != "constexpr" and types[name].endswith(":16"))
        },
    )


def sizes(entry: Entry) -> list[str]:
    """The integers that a kernel is launched with."""
    kernel, types, constants, *_ = parts(entry)
    return [name for name in kernel.arg_names if name not in constants and types[name].startswith(("i32", "i64"))]


def refusal(entry: Entry, ones: tuple[str, ...]) -> str | None:
    """What Triton's front end has against these sizes being 1, which it then takes as constants."""
    kernel, types, constants, options, _ = parts(entry)
    target = GPUTarget("cuda", entry.capability, 32)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options(options)
    ir.load_dialects(context)
    backend.load_dialects(context)
    whole = source(kernel, types, constants | dict.fromkeys(ones, 1))
    try:
        generators = backend.get_codegen_implementation(options)
        whole.make_ir(target, options, generators, backend.get_module_map(), context)
    except Exception as error:  # the other kernels' proofs stand
        return f"{kernel.__name__} {constants} with {', '.join(ones)} = 1: {type(error).__name__}: {error}"
    return None


def dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True).stdout


def report(entry: Entry) -> dict:
    """Local memory of one entry's machine code, where spills go, its shared memory and its tensor-core instructions.

    Only where a dot is meant is the code disassembled, which takes longer than to compile a small kernel.
    """
    kernel, types, constants, options, wants_dot = parts(entry)
    result = {"kernel": f"{kernel.__name__} {constants}", "sm": entry.capability, "wants_dot": wants_dot}
    try:
        target = GPUTarget("cuda", entry.capability, 32)
        code = triton.compile(source(kernel, types, constants), target=target, options=options)
    except Exception as error:  # the other kernels' proofs stand
        return result | {"raised": f"{type(error).__name__}: {error}"}
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", dump(code.asm["cubin"], "-res-usage")).groups()
    sass = dump(code.asm["cubin"], "-sass") if wants_dot else ""
    return result | {
        "local_bytes": int(stack) + int(local),
        "shared_bytes": code.metadata.shared,
        "tensor_cores": len(re.findall(TENSOR_CORES[entry.capability], sass)),
    }


def with_ones(entries: list[Entry]) -> list[tuple[Entry, tuple[str, ...]]]:
    """All sizes 1 in every configuration, whatever its blocks, and each size by itself in the first of every kernel."""
    asked: dict = {}
    for entry in entries:
        kernel, _, constants, *_ = parts(entry)
        names = sizes(entry)
        switches = str({name: x for name, x in constants.items() if type(x) is not int})
        asked.setdefault((kernel, switches), (entry, tuple(names)))
        for name in names:
            asked.setdefault((kernel, name), (entry, (name,)))
    return [(entry, ones) for entry, ones in asked.values() if ones]


def main(capabilities: str, *names: str) -> None:
    MODULES.update({name: load(name) for name in names})
    entries = [
        Entry(name, place, capability)
        for name, module in MODULES.items()
        for place, listed in enumerate(module.AOT)
        for capability in listed[5:] or map(int, capabilities.split(","))
    ]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        kernels = pool.map(report, entries, chunksize=1)
        asked = with_ones(entries)
        refusals = pool.starmap(refusal, asked)
    reports = {name: {"unlisted": unlisted(module), "kernels": [], "refused": []} for name, module in MODULES.items()}
    for entry, kernel in zip(entries, kernels, strict=True):
        reports[entry.module]["kernels"].append(kernel)
    for (entry, _), complaint in zip(asked, refusals, strict=True):
        reports[entry.module]["refused"] += [complaint] if complaint else []
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
