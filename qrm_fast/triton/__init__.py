"""The Triton kernels: importing the package imports its files, each of which registers its launchers for CUDA."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
