"""Argument checks of the public functions: metadata only, no data is read, so a compiled graph keeps them as guards."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64)
BOOL = (torch.bool,)
INT64 = (torch.int64,)
BOUNDARIES = {"S+1": (1, "S"), "2P+1": (2, "P")}  # of packed sequences and of pairs of them: one more than there are


class Checker:
    """Checks the tensors of one call against named dimensions.

    The first tensor that mentions a dimension fixes it; the first tensor fixes the device. A dimension is a name
    ("T"), one of BOUNDARIES or a number ("1").
    """

    def __init__(self) -> None:
        self.dims: dict[str, int] = {}
        self.device: torch.device | None = None

    def __call__(
        self, name: str, x: Tensor, shape: str, dtypes: tuple[torch.dtype, ...], *, strided: bool = False
    ) -> None:
        """Raise TypeError or ValueError unless `x` has this shape, one of these dtypes and dense rows.

        `strided=True` admits any stride in front of a dense last dimension.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [{shape.replace(' ', ', ')}], got {type(x).__name__}")
        # Nothing is worded before it is needed: a call of an op must not cost more than its kernel.
        names = shape.split()
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {_expected(names, dtypes)}, got {_got(x)}")
        if x.ndim != len(names):
            raise ValueError(f"{name} must be {_expected(names, dtypes)}, got {_got(x)}")
        for dim, size in zip(names, x.shape):  # noqa: B905  as long as each other
            want = self.dims.get(dim)
            if want is None:
                want = self._size(dim, size, name, x)
            if size != want:
                bound = "" if dim.isdigit() else f" with {dim} = {want}"
                raise ValueError(f"{name} must be {_expected(names, dtypes)}{bound}, got {_got(x)}")
        if self.device is None:
            self.device = x.device
        elif x.device != self.device:
            raise ValueError(f"{name} must be on {self.device} like the other arguments, got {x.device}")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} must have no forward-mode tangent, which would be dropped: go backward")
        if x.dtype == torch.float64 and x.is_cuda and len(dtypes) > 1:  # where it is not the only one asked for
            raise TypeError(f"{name} must not be float64 on CUDA: the kernels accumulate in float32 there")
        if x.is_contiguous():
            return
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in its last dimension, got stride {x.stride(-1)}")
        if not strided:
            raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")

    def _size(self, dim: str, size: int, name: str, x: Tensor) -> int:
        """The size that `dim` stands for, binding its name to `size` where this is its first mention."""
        if dim.isdigit():
            return int(dim)
        factor, symbol = BOUNDARIES.get(dim, (1, dim))
        plus = int(dim in BOUNDARIES)
        if symbol not in self.dims:
            if size < plus or (size - plus) % factor:
                raise ValueError(f"{name} must have {dim} entries for some {symbol} >= 0, got {_got(x)}")
            self.dims[symbol] = (size - plus) // factor
        return factor * self.dims[symbol] + plus


def _expected(names: list[str], dtypes: tuple[torch.dtype, ...]) -> str:
    return f"[{', '.join(names)}] {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"


def _got(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
