"""Triton's interpreter with bfloat16 as a GPU computes it, and fast enough for kernels of many small functions.

The interpreter holds bfloat16 as uint16: its dot multiplies the integers, and its casts truncate. `install` puts
products of the values, rounded to float32, and rounding to nearest in their place. It also prepares the language anew
for every function that a kernel calls; `install` has it do that once. Every operation builds the type of its result,
and that of its shape; `install` has it find the one among those built before, and build the other for a reader only.
"""

import functools

import numpy as np
import torch
import triton.language as tl
import triton.language.core as core
from triton.runtime import interpreter


def widened(x: interpreter.TensorHandle) -> np.ndarray:
    """The values in float32."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    # in double: on some CPUs a BLAS sums a row of float32 in an order that depends on the row's place
    product = widened(a).astype(np.float64) @ widened(b).astype(np.float64)
    return interpreter.TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)


def _call(self, *args, **kwargs):
    return self.rewrite()(*args, **kwargs)


@functools.cache
def _block_type(scalar: tl.dtype, shape: tuple) -> tl.block_type:
    return tl.block_type(scalar, list(shape))


def _tuple(self, values, type=None):
    self.values = list(values)
    if type is not None:
        self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)


def install() -> None:
    """Patches the interpreter of this process."""
    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(data, np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang(tl.sum.fn)  # what Triton's own functions see; a launch prepares what the kernel sees
    interpreter.InterpretedFunction.__call__ = _call

    core.tuple.__init__ = _tuple
    core.tuple.type = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
    core.tuple.type.__set_name__(core.tuple, "type")
    core.pointer_type.__hash__ = core.dtype.__hash__
    numpy_type = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: numpy_type(dtype.scalar)
    tl.block_type.with_element_ty = lambda self, scalar: _block_type(scalar, tuple(self.shape))
    interpreter.InterpreterBuilder.get_block_ty = lambda self, scalar, shape: _block_type(scalar, tuple(shape))
