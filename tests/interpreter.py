"""bfloat16 in Triton's interpreter, as a GPU computes it.

The interpreter holds bfloat16 as uint16: its dot multiplies the integers, and its casts truncate. `install` puts
float32 products of the values and rounding to nearest in their place.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(x: interpreter.TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return interpreter.TensorHandle(_widened(a) @ _widened(b) + d.data, d.dtype.scalar)


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
