"""What torch.autocast does to F.linear, for the heads."""

from typing import Any

import torch
from torch import Tensor


def as_for_linear(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, the floating tensors in its dtype (float64 and None stay), as F.linear receives them."""
    return tuple(x if _stays(x) else x.to(torch.get_autocast_dtype(x.device.type)) for x in tensors)


def _stays(x: Any) -> bool:
    return (
        not isinstance(x, Tensor)
        or x.dtype == torch.float64
        or x.device.type == "meta"
        or not torch.is_autocast_enabled(x.device.type)
    )
