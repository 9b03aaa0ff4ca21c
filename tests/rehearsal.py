"""A CUDA device that is none, so that what is for a GPU can be rehearsed without one: import it before qrm_fast.

Tensors "on cuda" lie on the CPU and carry a mark. Factories, `.to` and `.cuda` set it, what is computed from a marked
tensor has it, and a marked tensor and an unmarked one do not mix. So the public functions check as on CUDA, the kernels
of the CPU compute, launchers of Triton run in the interpreter, and the harness times by events. Benchmark cases are
registered at tiny sizes, and torch.compile compiles nothing.
"""

import contextlib
import os
import time

os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import harness

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICE, IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__
MAY_MIX = {"copy_", "to", "__getitem__", "__setitem__", "is_set_to", "set_"}
LARGEST = {"num_tokens": 256, "dim": 32, "policy_dim": 32, "q_dim": 32, "vocab": 300}
LARGEST |= {"calls": 2, "num_sequences": 4, "width": 64, "num_answers": 16}
lost = False  # whether an error sticks to the device


class Marked(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        given = list(_tensors((args, list(kwargs.values()))))
        on_cuda = any(_is_marked(x) for x in given)
        if function == IS_CUDA:
            return on_cuda
        if function == DEVICE:
            return CUDA if on_cuda else CPU
        name = getattr(function, "__name__", "")
        if name not in MAY_MIX and len({_is_marked(x) for x in given if x.dim()}) > 1:
            raise RuntimeError(f"{name} of tensors on cuda and on the CPU")
        target = kwargs.get("device")
        if name in ("cuda", "cpu", "pin_memory"):
            target, function = {"cuda": CUDA, "cpu": CPU}.get(name), Tensor.clone
        elif name == "to" and len(args) > 1:
            if isinstance(args[1], Tensor):
                target = CUDA if _is_marked(args[1]) else CPU
            elif _is_device(args[1]):
                target = args[1]
        if target is not None:
            on_cuda = torch.device(target).type == "cuda"
        args = [CPU if _is_device(x) else x for x in args]
        result = function(*args, **{k: CPU if _is_device(x) else x for k, x in kwargs.items()})
        if target is not None and args and result is args[0] and _is_marked(result) != on_cuda:
            result = result.clone()
        for x in _tensors(result):
            if all(x is not y for y in given):
                x.on_cuda = on_cuda
        return result


def _tensors(x):
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _tensors(part)


def _is_marked(x):
    return getattr(x, "on_cuda", False)


def _is_device(x):
    return isinstance(x, torch.device) or (isinstance(x, str) and x in ("cuda", "cpu"))


class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        self.ms = 1e3 * time.perf_counter()

    def synchronize(self):
        synchronize()

    def elapsed_time(self, end):
        return end.ms - self.ms


class Graph:
    def replay(self):
        pass


def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Generator(torch.Generator):
    def __new__(cls, device=CPU):
        return super().__new__(cls, CPU)


waiting = "default"


def set_sync_debug_mode(mode):
    global waiting
    waiting = mode


def registered_small(case):
    def small(environment=None, **shapes):
        grids = {
            device: [
                {k: min(x, LARGEST.get(k, x)) if isinstance(x, int) else x for k, x in shape.items()} for shape in grid
            ]
            for device, grid in shapes.items()
        }

        def register(build):
            if "NUM_TOKENS" in build.__globals__:
                build.__globals__["NUM_TOKENS"] = 512
            return case(environment, **grids)(build)

        return register

    return small


def install():
    interpreter.install()
    harness.case, harness.flush_bytes = registered_small(harness.case), lambda device: 1 << 10
    harness.interleaved.__kwdefaults__["repeats"] = 2
    torch.compile = lambda function=None, **options: function or (lambda function: function)
    torch.Generator = Generator
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.get_device_name = lambda device=None: "no GPU"
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda: 0
    torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache = lambda: None
    torch.cuda.device_of = torch.cuda.graph = lambda x: contextlib.nullcontext()
    torch.cuda.Event, torch.cuda.CUDAGraph, torch.cuda.synchronize = Event, Graph, synchronize
    torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode = set_sync_debug_mode, lambda: waiting
    Marked().__enter__()


install()
