"""Compile Triton kernels for GPUs that are not here: `python tests/aot.py 80,90 MODULE_OR_FILE...`, JSON out.

A process of its own, because the tests run with the interpreter on and Triton decides that at decoration; it compiles
on every core. What is compiled is what launchers launch: every file of tests/launches, and every FILE, has a function
`launches(capability)` that calls launchers on meta tensors, and recorder.py records the specialisations that Triton
would choose. A module's report has those of its own kernels.

Triton takes a size of 1 as a constant: its front end is asked once more about every kernel with sizes of 1.
"""

import ast
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import triton
from recorder import Launch, recording, specialisations, target
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ROOMS = Path(__file__).parent / "launches"
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b", 120: r"\bHMMA\."}


def load(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def callees(kernel: JITFunction) -> set[JITFunction]:
    """Jitted functions that it names."""
    names = {node.id for node in ast.walk(kernel.parse()) if isinstance(node, ast.Name)}
    named = (kernel.fn.__globals__.get(name) for name in names)
    return {f for f in named if isinstance(f, JITFunction)}


def reached(kernels: set[JITFunction]) -> set[JITFunction]:
    """The kernels, what they call, and so on."""
    found: set = set()
    while kernels:
        found |= kernels
        kernels = set().union(*map(callees, kernels)) - found
    return found


def unlaunched(module: ModuleType, found: set[JITFunction]) -> list[str]:
    """Jitted functions of the module that no recorded launch reaches."""
    jitted = {f for f in vars(module).values() if isinstance(f, JITFunction)}
    return sorted(f.__name__ for f in jitted - found if f.fn.__module__ == module.__name__)


def wants_dot(launch: Launch) -> bool:
    """Whether it multiplies 16-bit matrices, which tensor cores are for."""
    narrow = any(re.search(r"\b(bf16|fp16)\b", kind) for kind in launch.signature.values())
    return narrow and any("tl.dot(" in f.src for f in reached({launch.kernel}))


def named(launch: Launch) -> str:
    """The kernel and what it takes as constants."""
    names = launch.kernel.arg_names
    return f"{launch.kernel.__name__} { {names[path[0]]: x for path, x in launch.constants.items()} }"


LAUNCHES: list[Launch] = []  # the processes that compile are forked with it


def dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True).stdout


def report(place: int) -> dict:
    """Local memory of one launch's machine code, where spills go, its shared memory and its tensor-core instructions.

    Only where a dot is meant or local memory is used is the code disassembled, which takes longer than to compile a
    small kernel.
    """
    launch = LAUNCHES[place]
    result = {"kernel": named(launch), "sm": launch.capability, "grid": launch.grid, "wants_dot": wants_dot(launch)}
    try:
        code = triton.compile(launch.source(), target=target(launch.capability), options=vars(launch.options))
    except Exception as error:  # the other kernels' proofs stand
        return result | {"raised": f"{type(error).__name__}: {error}"}
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", dump(code.asm["cubin"], "-res-usage")).groups()
    local_bytes = int(stack) + int(local)
    sass = dump(code.asm["cubin"], "-sass") if result["wants_dot"] or local_bytes else ""
    # for sm_120 a copy by descriptor writes 8 bytes there that nothing reads
    return result | {
        "local_bytes": local_bytes if re.search(r"\bLDL\b", sass) else 0,
        "shared_bytes": code.metadata.shared,
        "tensor_cores": len(re.findall(TENSOR_CORES[launch.capability], sass)),
    }


def sizes(launch: Launch) -> list[str]:
    """The integers that would become constants if they were 1."""
    return [
        x.name
        for x in launch.kernel.params
        if launch.signature[x.name] in ("i32", "i64") and not x.do_not_specialize and not x.annotation_type
    ]


def refusal(place: int, ones: tuple[str, ...]) -> str | None:
    """What Triton's front end has against these sizes being 1, which it then takes as constants."""
    launch = LAUNCHES[place]
    paths = {(launch.kernel.arg_names.index(name),): 1 for name in ones}
    source = ASTSource(
        launch.kernel,
        launch.signature | dict.fromkeys(ones, "constexpr"),
        launch.constants | paths,
        {path: x for path, x in launch.attributes.items() if path not in paths},
    )
    backend, context = make_backend(target(launch.capability)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(launch.options)
    try:
        source.make_ir(target(launch.capability), launch.options, generators, backend.get_module_map(), context)
    except Exception as error:  # the other kernels' proofs stand
        return f"{named(launch)} with {', '.join(ones)} = 1: {type(error).__name__}: {error}"
    return None


def with_ones(launches: list[Launch]) -> list[tuple[int, tuple[str, ...]]]:
    """All sizes 1 in every configuration, whatever its blocks, and each size by itself in the first of every kernel."""
    asked: dict = {}
    for place, launch in enumerate(launches):
        switches = str({path: x for path, x in launch.constants.items() if type(x) is not int})
        asked.setdefault((launch.kernel, switches), (place, tuple(sizes(launch))))
        for name in sizes(launch):
            asked.setdefault((launch.kernel, name), (place, (name,)))
    return [(place, ones) for place, ones in asked.values() if ones]


def recorded(rooms: dict[str, ModuleType], capabilities: list[int]) -> tuple[list[Launch], dict[str, str]]:
    """What the rooms launch, and the errors of those that cannot, as a launcher that waits for a result cannot."""
    launches, errors = [], {}
    for capability in capabilities:
        for name, room in rooms.items():
            with recording(capability) as here:
                try:
                    room.launches(capability)
                except Exception as error:  # the other kernels' proofs stand
                    errors[name] = f"{type(error).__name__}: {error}"
            launches += here
    return launches, errors


def main(capabilities: str, *names: str) -> None:
    modules = {name: load(name) for name in names}
    stems = [file.stem for file in sorted(ROOMS.glob("[!_]*.py"))]
    rooms = {f"qrm_fast.triton.{stem}": load(f"launches.{stem}") for stem in stems}
    rooms |= {name: module for name, module in modules.items() if name.endswith(".py")}
    launches, errors = recorded(rooms, list(map(int, capabilities.split(","))))
    found = reached({launch.kernel for launch in launches})
    reports = {
        name: {"error": errors.get(name), "unlaunched": unlaunched(module, found), "kernels": [], "refused": []}
        for name, module in modules.items()
    }
    of_module = {module.__name__: reports[name] for name, module in modules.items()}
    LAUNCHES.extend(x for x in specialisations(launches) if x.module in of_module)
    asked = with_ones(LAUNCHES)
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        kernels = pool.map(report, range(len(LAUNCHES)), chunksize=1)
        refusals = pool.starmap(refusal, asked)
    for launch, kernel in zip(LAUNCHES, kernels, strict=True):
        of_module[launch.module]["kernels"].append(kernel)
    for (place, _), complaint in zip(asked, refusals, strict=True):
        of_module[LAUNCHES[place].module]["refused"] += [complaint] if complaint else []
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
