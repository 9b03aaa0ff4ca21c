"""Build the compiled extensions. What is built depends on what *can* be built, never on a GPU being plugged in."""

import shutil
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch >= 2.11
CXX = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", *STABLE_ABI]


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p) for p in Path("csrc", folder).iterdir() if p.suffix in suffixes)


extensions = [
    CppExtension("qrm_fast._cpu", sources("cpu", ".cpp"), extra_compile_args={"cxx": CXX}, py_limited_api=True),
    Pybind11Extension("qrm_fast._host", sources("host", ".cpp"), cxx_std=17, extra_compile_args=["-O3"]),
]
if torch.version.cuda and shutil.which("nvcc"):
    extensions.append(
        CUDAExtension(
            "qrm_fast._cuda",
            sources("cuda", ".cpp", ".cu"),
            extra_compile_args={
                "cxx": [*CXX, "-DUSE_CUDA"],
                "nvcc": ["-O3", "-std=c++17", "-DUSE_CUDA", *STABLE_ABI],
            },
            py_limited_api=True,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
