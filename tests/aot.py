"""Compile a Triton module's kernels for GPUs that are not here: `python tests/aot.py MODULE_OR_FILE 80 90`, JSON out.

A process of its own, because the tests run with the interpreter on and Triton decides that at decoration. The module
lists its kernels, one entry per configuration it launches:

    AOT = [(kernel, {"x_ptr": "*bf16", "num_rows": "i32"}, {"BT": 64}, num_warps, wants_dot)]
"""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\bHG?MMA\.", 100: r"\b(HMMA|UTC\w*MMA)\."}


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


def compile_entry(kernel, types: dict, constants: dict, num_warps: int, capability: int) -> str:
    """SASS of the kernel; pointers are aligned to 16 bytes, as PyTorch's allocations are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", "-sass", cubin.name], capture_output=True, text=True, check=True
        ).stdout


def main(name: str, *capabilities: str) -> None:
    module = load(name)
    kernels = []
    for kernel, types, constants, num_warps, wants_dot in module.AOT:
        for capability in map(int, capabilities):
            sass = compile_entry(kernel, types, constants, num_warps, capability)
            kernels.append(
                {
                    "kernel": f"{kernel.__name__} {constants}",
                    "sm": capability,
                    "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)),
                    "local_memory": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                    "tensor_cores": len(re.findall(TENSOR_CORES[capability], sass)),
                    "wants_dot": wants_dot,
                }
            )
    json.dump({"unlisted": unlisted(module), "kernels": kernels}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
