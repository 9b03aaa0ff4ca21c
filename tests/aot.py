"""Compile a Triton module's kernels for GPUs that are not here: `python tests/aot.py MODULE_OR_FILE 80 90`, JSON out.

A process of its own, because the tests run with the interpreter on and Triton decides that at decoration. The module
lists its kernels, one entry per configuration it launches:

    AOT = [(kernel, {"x_ptr": "*bf16", "num_rows": "i32"}, {"BT": 64}, num_warps, wants_dot)]

In place of `num_warps` may stand all compile options, {"num_warps": 8, "num_stages": 4}; a sixth member names the only
architecture that runs the configuration. A dimension whose multiples of 16 matter is written "i32:16".
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


def compile_entry(kernel, types: dict, constants: dict, options: dict, capability: int) -> tuple[str, int]:
    """SASS of the kernel and its shared memory; pointers are aligned to 16 bytes, as PyTorch's allocations are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name].removesuffix(":16") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or (name in types and types[name].endswith(":16"))
        },
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin.name], capture_output=True, text=True, check=True)
        return dump.stdout, compiled.metadata.shared


def main(name: str, *capabilities: str) -> None:
    module = load(name)
    kernels = []
    for kernel, types, constants, options, wants_dot, *only in module.AOT:
        for capability in only or map(int, capabilities):
            options = options if isinstance(options, dict) else {"num_warps": options}
            sass, shared_bytes = compile_entry(kernel, types, constants, options, capability)
            kernels.append(
                {
                    "kernel": f"{kernel.__name__} {constants}",
                    "sm": capability,
                    "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", sass)),
                    "local_memory": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                    "shared_bytes": shared_bytes,
                    "tensor_cores": len(re.findall(TENSOR_CORES[capability], sass)),
                    "wants_dot": wants_dot,
                }
            )
    json.dump({"unlisted": unlisted(module), "kernels": kernels}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
