"""Build the compiled extensions. What is built depends on what *can* be built, never on a GPU being plugged in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup

if "CUDA_HOME" not in os.environ:  # nvcc of cuda-toolkit's wheels, which fits the torch beside it, or another
    folders = [f"{folder}/nvidia/cu{str(torch.version.cuda).partition('.')[0]}/bin" for folder in sys.path]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ["PATH"], "/usr/local/cuda/bin"]))
    if nvcc:  # it may be a wrapper: it knows where its toolkit is
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1])

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch >= 2.11
CXX = ["-O3", "-g0", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
CXX += STABLE_ABI
CUDA_ARCHITECTURES = ["80", "90a", "100", "120"]  # a: with what only Hopper has
NVCC = [
    *("-O3", "-std=c++17", "-DUSE_CUDA", *STABLE_ABI),
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES),
    "-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]),  # PTX for those to come
]


def extensions() -> list[Extension]:
    headers = [str(p) for p in Path("csrc").rglob("*.h*")]

    def sources(folder: str, *suffixes: str) -> list[str]:
        return sorted(str(p) for p in Path("csrc", folder).iterdir() if p.suffix in suffixes)

    built = [
        CppExtension(
            "qrm_fast._cpu",
            sources("cpu", ".cpp"),
            depends=headers,
            extra_compile_args={"cxx": CXX},
            py_limited_api=True,
        ),
        Extension(
            "qrm_fast._host",
            sources("host", ".cpp"),
            depends=headers,
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"],
        ),
    ]
    if torch.version.cuda and shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin"):
        cuda = CUDAExtension(
            "qrm_fast._cuda",
            sources("cuda", ".cpp", ".cu"),
            depends=headers,
            extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA"], "nvcc": NVCC},
            py_limited_api=True,
        )
        cuda.libraries.remove("cudart")  # torch has loaded its own, and the wheel's has no name for the linker
        built.append(cuda)
    return built


class Build(BuildExtension):
    """One folder of objects for wheels, editable installs and in-place builds: what one compiled, the next reuses."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/objects"


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
