"""What can be proven about the build without a GPU: machine code, symbols, dispatch, packages."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import triton
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

import qrm_fast
from qrm_fast import doctor
from qrm_fast.ops import hopper, scans

ROOT = Path(__file__).parent.parent
PACKAGE = Path(qrm_fast.__file__).parent
EXTENSIONS = sorted(PACKAGE.glob("_c*.abi3.so"))


def run(*command, **options) -> str:
    """stdout of a command; its stderr is in the assertion when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# Triton kernels, ahead of time


STEMS = sorted(p.stem for p in PACKAGE.glob("triton/*.py") if "@triton.jit" in p.read_text())
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # that one block can have
GRID = 2**31 - 1, 65535, 65535
# Machine codes of the launches of tests/launches by architecture: in a training step, and in steps of other sizes too.
SPECIALISATIONS = {"80": [99, 120], "90": [133, 161], "100": [100, 124]}


def compiled(modules: list[str], *capabilities: int) -> dict[str, dict]:
    """What tests/aot.py reports of each module."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests/aot.py", ",".join(map(str, capabilities)), *modules]
    return json.loads(run(*command, cwd=ROOT, env=environment))


def check_triton(module: str, report: dict) -> None:
    assert not report["error"], f"launches of {module} raise {report['error']}"
    assert not report["unlaunched"], f"no launch reaches {report['unlaunched']} of {module}"
    for kernel in report["kernels"]:
        assert "raised" not in kernel, f"does not compile: {kernel}"
        assert kernel["local_bytes"] == 0, f"spills: {kernel}"
        assert kernel["shared_bytes"] <= SHARED_BYTES[kernel["sm"]], f"more shared memory than there is: {kernel}"
        grid = kernel["grid"]
        assert all(x <= most for x, most in zip(grid, GRID, strict=True)), f"larger grid than there is: {kernel}"
        assert not kernel["wants_dot"] or kernel["tensor_cores"] > 0, f"no tensor-core instruction: {kernel}"
    assert not report["refused"], f"does not compile with sizes of one: {report['refused']}"


@pytest.fixture(scope="module")
def reports(request) -> dict[str, dict]:
    """Of the modules whose tests were chosen, compiled in one process."""
    chosen = [
        item for item in request.session.items if item.originalname == "test_triton_kernels_compile_without_spills"
    ]
    return compiled([f"qrm_fast.triton.{item.callspec.params['stem']}" for item in chosen], *SHARED_BYTES)


@pytest.mark.parametrize("stem", STEMS)
def test_triton_kernels_compile_without_spills(stem, reports):
    check_triton(stem, reports[f"qrm_fast.triton.{stem}"])


def test_no_more_specialisations_than_are_said():
    """A size whose alignment or value of 1 compiles anew gains by it, or stands in its kernel's do_not_specialize."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = json.loads(run(sys.executable, ROOT / "tests/specialisations.py", cwd=ROOT, env=environment))
    assert found == SPECIALISATIONS, f"update SPECIALISATIONS, and say in the commit why, if {found} are worth it"


PRELUDE = """
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def double(x):
        return x * 2

    @triton.jit
    def normalise(x, out, num_rows, WIDE: tl.constexpr, BT: tl.constexpr):
        o_t = tl.arange(0, BT)
        if WIDE:
            num_rows = num_rows.to(tl.int64)
        b_x = tl.load(x + o_t, o_t < num_rows, 0.0)
        tl.store(out + o_t, double(b_x) / tl.sum(b_x))

    @triton.jit
    def product(x, out, depth, WIDE: tl.constexpr, BT: tl.constexpr):
        o_t = tl.arange(0, BT)
        b_sum = tl.zeros([BT, BT], tl.float32)
        for i_d in range(0, depth, BT):
            b_x = tl.load(x + o_t[:, None] * depth + i_d + o_t[None, :])
            if WIDE:
                b_x = b_x.to(tl.float32)
            b_sum = tl.dot(b_x, b_x, b_sum, input_precision="ieee")
        tl.store(out + o_t[:, None] * BT + o_t[None, :], b_sum)

    def normalised(block, wide=False, num_rows=1000, grid=(1,)):
        x = torch.empty(num_rows)
        normalise[grid](x, x, num_rows, wide, block, num_warps=1)

    def multiplied(dtype=torch.bfloat16, wide=False, num_stages=3):
        block = 32 if wide or dtype == torch.float32 else 64
        x, out = torch.empty(block, 1024, dtype=dtype), torch.empty(block, block)
        product[(1,)](x, out, 1024, wide, block, num_stages=num_stages)
"""


PROOFS = {  # launches of a module, and what is wrong with it
    "good": ("normalised(128), multiplied(), multiplied(torch.float32)", None),
    "waits": ("normalised(128), multiplied(), torch.empty(1).item()", "waits.py raise .*meta"),
    "unlaunched": ("normalised(128)", r"no launch reaches \['product'\]"),
    "raises": ("normalised(100), multiplied()", "does not compile: .*power of 2"),
    "spills": ("normalised(8192), multiplied()", "spills: .*normalise"),
    "shares": ("normalised(128), multiplied(num_stages=40)", "more shared memory than there is: .*product"),
    "grids": ("normalised(128, grid=(1, 65536)), multiplied()", "larger grid than there is: .*normalise"),
    "sizes": ("normalised(128, True), multiplied()", "sizes of one: .*normalise .* with num_rows = 1"),
    "dots": ("normalised(128), multiplied(wide=True)", "no tensor-core instruction: .*product"),
}


def test_the_triton_proof_can_fail(tmp_path):
    files = {name: tmp_path / f"{name}.py" for name in PROOFS}
    for name, (calls, _) in PROOFS.items():
        files[name].write_text(f"{textwrap.dedent(PRELUDE)}\n\ndef launches(capability):\n    {calls}\n")
    reports = compiled([str(file) for file in files.values()], 80, 90, 100)
    for name, (_, complaint) in PROOFS.items():
        report = reports[str(files[name])]
        if complaint is None:
            check_triton(str(files[name]), report)
        else:
            with pytest.raises(AssertionError, match=complaint):
                check_triton(str(files[name]), report)


def test_the_recorder_decides_as_triton_does(tmp_path):
    (tmp_path / "kernels.py").write_text(textwrap.dedent(PRELUDE))
    script = """
        import torch
        from kernels import normalise
        from recorder import recording, specialisations

        with recording(90) as launches:
            x, out = torch.empty(2, 4096)
            for x, num_rows, height in (x, 1024, 1), (x, 4096, 7), (x[1:], 1000, 2), (x[4:], 1, 2):
                normalise[(num_rows, height)](x, out, num_rows, False, BT=128, num_warps=2)
        for launch in specialisations(launches):
            num_rows = launch.constants.get((2,), launch.signature["num_rows"])
            print(num_rows, [i for (i,), x in launch.attributes.items() if x], launch.options.num_warps, launch.grid)
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT)])
    assert run(sys.executable, "-c", textwrap.dedent(script), env=environment).splitlines() == [
        "i32 [0, 1, 2] 2 (4096, 7, 1)",  # two launches of one specialisation
        "i32 [1] 2 (1000, 2, 1)",
        "1 [0, 1] 2 (1, 2, 1)",
    ]


# CUDA sources

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Sources for Hopper alone, with their kernels, the columns of a product, and how many products.
HEADS = {"head_fold": (2, 256, 1), "q_values_fold": (2, 192, 2), "head_dz": (2, 256, 1), "head_product": (4, 256, 1)}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


def check_cuda(source: Path, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command = ["nvcc", "-c", source, "-o", folder / "kernel.o", "-Xptxas", "-v", "--threads", "2"]
    command += [*COMMON_NVCC_FLAGS, *setup.NVCC, "-Xcompiler", "-fPIC", *includes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    stores = [int(number) for number in re.findall(r"(\d+) bytes spill stores", report)]
    assert len(stores) >= len(setup.CUDA_ARCHITECTURES), f"no kernel compiled for every architecture:\n{report}"
    assert not any(stores), f"spills:\n{report}"
    assert "serialized" not in report, f"products that wait for each other:\n{report}"
    images = run(CUOBJDUMP, "--list-elf", "--list-ptx", folder / "kernel.o")
    codes = set(re.findall(r"\.(sm_\w+)\.(cubin|ptx)", images))
    assert codes == {
        *((f"sm_{a.rstrip('a')}", "cubin") for a in setup.CUDA_ARCHITECTURES),  # as cuobjdump calls them
        (f"sm_{setup.CUDA_ARCHITECTURES[-1]}", "ptx"),
    }


@needs_nvcc
@pytest.mark.parametrize("stem", sorted({p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")} - HEADS.keys()))
def test_cuda_sources_compile_without_spills(stem, tmp_path):
    check_cuda(ROOT / f"csrc/cuda/{stem}.cu", tmp_path)


@needs_nvcc
@pytest.mark.parametrize("stem", HEADS)
def test_heads_are_made_of_what_hopper_has(stem, tmp_path):
    """Products of groups of warps from shared memory, tiles that arrive in two blocks at once, registers that change
    hands; in the loops no fence of the whole memory, which arrivals in another block may bring."""
    check_cuda(ROOT / f"csrc/cuda/{stem}.cu", tmp_path)
    text = run(CUOBJDUMP, "-sass", "-arch", "sm_90", tmp_path / "kernel.o")
    kernels = re.findall(r"Function : \S*?(__half|__nv_bfloat16)(.*?)(?=Function|\Z)", text, re.DOTALL)
    num_kernels, columns, products = HEADS[stem]
    assert len(kernels) == num_kernels
    for dtype, code in kernels:
        product = rf"HGMMA\.64x{columns}x16\.F32" + (r"\.BF16" if dtype == "__nv_bfloat16" else " ")
        assert len(re.findall(product, code)) == len(re.findall("HGMMA", code)) == 4 * products  # 64 of the depth
        needed = {"UTMALDG.2D", "UTMALDG.2D.MULTICAST", "USETMAXREG.DEALLOC.CTAPOOL"}
        needed |= {"UTMASTG.2D"} if stem in ("head_fold", "head_dz") else set()
        assert needed <= set(re.findall(r"U[\w.]+", code))
        barriers = len(re.findall(r"UCGABAR_WAIT", code))
        assert len(re.findall(r"MEMBAR\.\w+\.GPU", code)) <= barriers == 2


@needs_nvcc
@pytest.mark.parametrize(("values", "spilled"), [(8, False), (96, True)])
def test_the_cuda_proof_can_fail(tmp_path, values, spilled):
    source = tmp_path / "kernel.cu"
    source.write_text(f"""
__global__ void __launch_bounds__(1024) normalise(const float* x, float* out) {{
  float b_x[{values}], sum = 0;
#pragma unroll
  for (int i = 0; i < {values}; ++i) sum += b_x[i] = x[i * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < {values}; ++i) out[i * blockDim.x + threadIdx.x] = b_x[i] / sum;
}}
""")
    if spilled:
        with pytest.raises(AssertionError, match="spills"):
            check_cuda(source, tmp_path)
    else:
        check_cuda(source, tmp_path)


def test_nvcc_of_the_wheels_is_found_before_another(tmp_path):
    """They put it beside their headers and a runtime that has no name for the linker."""
    nvcc = tmp_path / "nvidia/cu13/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "#\\$ TOP=$(dirname $0)/.." >&2\n')
    nvcc.chmod(0o755)
    script = """
        import os, sys, torch
        torch.version.cuda = "13.0"
        sys.path.append(sys.argv[1])
        import setup
        torch.utils.cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # as a CUDA torch has read it
        (cuda,) = [x for x in setup.extensions() if x.name == "qrm_fast._cuda"]
        print(os.environ["CUDA_HOME"], "cudart" in cuda.libraries)
    """
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"}
    printed = run(sys.executable, "-c", textwrap.dedent(script), tmp_path, cwd=ROOT, env=environment)
    assert printed.split() == [str(tmp_path / "nvidia/cu13"), "False"]


# Symbols and dispatch


@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda path: path.name)
def test_extensions_use_only_the_stable_interface(extension):
    """Undefined symbols come from torch's C interface, Python, or (versioned, or in std::) the system's libraries."""
    names = [line.split(maxsplit=1)[1] for line in run("nm", "-DuC", extension).splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    allowed = re.compile(r"aoti_torch_|torch_|_?Py|_ITM_|__gmon_start__|cuda|__cuda|(VTT for |vtable for )?std::|.*@")
    foreign = [name for name in names if not allowed.match(name) or re.search(r"\b(at|c10|caffe2)::", name)]
    assert not foreign


def test_every_op_has_a_kernel_for_cpu_or_says_that_it_needs_none():
    rows = {row.op: row for row in doctor.served()}
    assert rows["gae"].cpu == "csrc/cpu/gae.cpp"
    assert not [row.op for row in rows.values() if row.cpu is None]
    for row in rows.values():
        assert (ROOT / row.fallback).is_file() and row.fallback.startswith("qrm_fast/ops/")
        if row.cpu == row.fallback:
            assert row.cuda == row.fallback
        else:
            assert (ROOT / row.cpu).is_file() and row.cpu.startswith("csrc/cpu/")


def test_doctor_prints_who_serves_what(capsys):
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"gae +csrc/cpu/gae\.cpp +\S+ +qrm_fast/ops/gae\.py", line) for line in lines)
    page = r"qrm_fast/ops/whiten\.py"
    assert any(re.fullmatch(rf"whiten +{page} +{page} +{page}", line) for line in lines)
    assert any(re.match(r"torch +\d", line) for line in lines)


CUDA_TORCH = """
    import importlib.machinery, os, sys, types, torch

    os.environ["TRITON_INTERPRET"] = "0"
    torch.version.cuda = "13.0"
    if len(sys.argv) > 1:
        built = sys.modules["qrm_fast._cuda"] = types.ModuleType("qrm_fast._cuda")
        built.__spec__ = importlib.machinery.ModuleSpec("qrm_fast._cuda", None)
    import qrm_fast
    from qrm_fast import doctor

    class OnCuda(torch.Tensor):  # meets the kernels of CUDA
        @staticmethod
        def __new__(cls, x):
            return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device="cuda:0")

        __torch_dispatch__ = None

    x, cu_seqlens = OnCuda(torch.zeros(3)), OnCuda(torch.tensor([0, 3]))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Python)):
        for name, columns in {"gae": 2, "discounted_returns": 1, "min_gae": 2, "vtrace": 3}.items():
            try:
                getattr(qrm_fast, name)(*[x] * columns, cu_seqlens)
            except RuntimeError as error:
                print("refused:", error)
    doctor.main()
"""


def imported_by_a_cuda_torch(*arguments: str) -> subprocess.CompletedProcess:
    """CUDA_TORCH; with an argument beside an extension of nvcc's that lacks its kernels."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CUDA_TORCH), *arguments], capture_output=True, text=True
    )


def test_without_nvcc_the_scans_refuse_cuda_and_name_the_fix():
    done = imported_by_a_cuda_torch()
    assert done.returncode == 0, done.stderr
    fix = r'.*`pip install "cuda-toolkit\[nvcc,cccl\]==13\.0\.\*"`.* `pip install --no-build-isolation \.`'
    served = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    for name in scans.SCANS:
        assert re.search(rf"^refused: {name} on CUDA is compiled by nvcc{fix}", done.stdout, re.MULTILINE)
        assert re.fullmatch(rf"{name} +csrc/cpu/{name}\.cpp +needs nvcc +qrm_fast/ops/{name}\.py", served[name])
    assert re.search(rf"^needs nvcc: an error on CUDA tensors;{fix}", done.stdout, re.MULTILINE)
    assert "qrm_fast/triton/token_q.py" in served["token_q"]


def test_a_cuda_extension_older_than_the_sources_names_the_ops_and_the_fix():
    lacking = ", ".join(f"{name} for CUDA" for name in (*scans.SCANS, *hopper.SCHEMAS))
    assert f"they lack kernels of {lacking}; run" in imported_by_a_cuda_torch("with nvcc").stderr


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory):
    """The interpreter of a new environment that borrows torch from this one, but no qrm_fast, PYTHONPATH's or other."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield python


def test_a_missing_extension_names_the_fix(tmp_path, fresh_python):
    shutil.copytree(PACKAGE, tmp_path / "qrm_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run([fresh_python, "-c", "import qrm_fast"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: the compiled extensions of qrm_fast are missing" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


def test_an_extension_older_than_the_sources_names_the_ops_and_the_fix(tmp_path, fresh_python):
    shutil.copytree(PACKAGE, tmp_path / "qrm_fast", ignore=shutil.ignore_patterns("__pycache__"))
    op = (PACKAGE / "ops/moments.py").read_text().replace('constant_op("moments")', 'constant_op("younger")')
    (tmp_path / "qrm_fast/ops/moments.py").write_text(op)
    done = subprocess.run([fresh_python, "-c", "import qrm_fast"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: the compiled extensions of qrm_fast are older than its sources" in done.stderr
    assert "lack kernels of younger; run `pip install --no-build-isolation .`" in done.stderr


# Packages


def test_the_wheel_works_elsewhere(tmp_path, fresh_python):
    for stale in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(stale)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("qrm_fast-*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert "qrm_fast/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert not [name for name in packed if name.startswith(("csrc", "tests", "bench"))]

    run(*pip, "--python", fresh_python, "install", "--no-deps", "--no-index", wheel)
    script = """
        import torch, qrm_fast
        from qrm_fast import doctor
        rewards, cu_seqlens = torch.tensor([0.0, 1.0]), torch.tensor([0, 2])
        print(qrm_fast.__file__)
        print(qrm_fast.gae(rewards, torch.zeros(2), cu_seqlens, gamma=1.0, lam=0.5).advantages.tolist())
        print(next(row.cpu for row in doctor.served() if row.op == "gae"))
    """
    file, advantages, served = run(fresh_python, "-c", textwrap.dedent(script), cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(fresh_python.parent.parent)
    assert advantages == "[0.5, 1.0]"
    assert served == "csrc/cpu/gae.cpp"


def test_the_source_archive_holds_all_sources(tmp_path):
    backend = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", backend, tmp_path, cwd=ROOT)
    (archive,) = tmp_path.glob("qrm_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    needed = [*(ROOT / "csrc").rglob("*.*"), *PACKAGE.rglob("*.py"), *(ROOT / f for f in ("setup.py", "LICENSE"))]
    assert not {str(path.relative_to(ROOT)) for path in needed} - packed
