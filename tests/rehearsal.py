"""A CUDA device that is none, so that what is for a GPU can be rehearsed without one: import it before qrm_fast.

Tensors "on cuda" lie on the CPU and carry a mark. Factories, `.to` and `.cuda` set it, what is computed from a marked
tensor has it, and a marked tensor and an unmarked one do not mix. So the public functions check as on CUDA, the kernels
of the CPU compute, launchers of Triton run in the interpreter, and the harness times by events. Benchmark cases are
registered at tiny sizes, and torch.compile compiles nothing. A CUDA graph records what is dispatched, and its replay
writes where that has written.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICE, IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__
MAY_MIX = {"_has_compatible_shallow_copy_type", "copy_", "to", "__getitem__", "__setitem__", "is_set_to", "set_"}
SET_DATA = Tensor.data.__set__
WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "equal", "allclose"}
WAITS |= {f"__{number}__" for number in ("bool", "int", "float", "index")}
LARGEST = {"num_tokens": 256, "dim": 32, "policy_dim": 32, "q_dim": 32, "vocab": 300}
LARGEST |= {"calls": 2, "num_sequences": 4, "width": 64, "num_answers": 16}
LARGEST |= {"prompt": 6, "answer": 8, "rows": 16, "groups": 3}
SMALLER = {"1.5b": str(Path(__file__).with_name("tiny_qwen2"))}  # a published shape
lost = False  # whether an error sticks to the device


class Marked(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.device, torch._C._nn._parse_to):
            return function(*args, **kwargs)
        given = list(_tensors((args, list(kwargs.values()))))
        on_cuda = any(_is_marked(x) for x in given)
        if function == IS_CUDA:
            return on_cuda
        if function == DEVICE:
            return CUDA if on_cuda else CPU
        name = getattr(function, "__name__", "")
        if function == SET_DATA:  # how a module is moved
            function(*args)
            args[0].on_cuda = _is_marked(args[1])
            return None
        if waiting == "error" and on_cuda and _waits(name, args, kwargs):
            raise RuntimeError(f"{name} waits for the device")
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
        if wide := kwargs.pop("out_dtype", None):  # sums of a product that CPUs do not offer
            args = [x.to(wide) for x in args]
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


def _waits(name, args, kwargs):
    """Whether this call on a device would; of what C++ calls below it, nothing is seen."""
    if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
        return any(x.dtype == torch.bool for x in _tensors(args[1]))
    if name == "repeat_interleave":
        return len(list(_tensors(args))) > 1 and kwargs.get("output_size") is None
    if name == "to":
        return any(_is_device(x) and torch.device(x) == CPU for x in (*args[1:], kwargs.get("device")))
    return name in WAITS


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


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, results in self.calls:
                for x, y in zip(_tensors(results), _tensors(function(*args, **kwargs)), strict=True):
                    if x.data_ptr() != y.data_ptr():
                        x.copy_(y)


class Stream:
    def wait_stream(self, other):
        pass


def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """[N, H, D]: causal attention inside each sequence, the last query beside the last key."""
    assert window_size == (-1, 0) and enable_gqa
    with torch._C.DisableTorchFunction():  # a kernel reads boundaries on the device
        rows, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
        out = []
        for parts in zip(query.split(rows), key.split(keys), value.split(keys), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in parts)  # [1, H, L, D]
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            out.append(attended[0].transpose(0, 1))
        result = torch.cat(out)
    result.on_cuda = True
    return result


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
                {k: min(x, LARGEST.get(k, x)) if isinstance(x, int) else SMALLER.get(x, x) for k, x in shape.items()}
                for shape in grid
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
    torch.cuda.device_of = torch.cuda.stream = lambda x: contextlib.nullcontext()
    torch.cuda.graph, torch.cuda.Stream, torch.cuda.current_stream = lambda graph: graph, Stream, Stream
    varlen.varlen_attn = varlen_attn
    group = clip_grad._group_tensors_by_device_and_dtype  # in C++, which sees where they are
    for module in (clip_grad, sys.modules[torch.optim.Optimizer.__module__]):
        module._group_tensors_by_device_and_dtype = lambda tensors, *rest: {
            (tensors[0][0].device, dtype): parts for (_, dtype), parts in group(tensors, *rest).items()
        }
    make = Tensor._make_subclass

    def make_subclass(kind, data, *args, **kwargs):  # a parameter, of its tensor
        made = make(kind, data, *args, **kwargs)
        made.on_cuda = _is_marked(data)
        return made

    Tensor._make_subclass = staticmethod(make_subclass)
    torch.cuda.Event, torch.cuda.CUDAGraph, torch.cuda.synchronize = Event, Graph, synchronize
    torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode = set_sync_debug_mode, lambda: waiting
    Marked().__enter__()


install()
