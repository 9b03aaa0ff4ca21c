"""How exact a result must be: never a tolerance picked per dtype."""

import torch
from torch import Tensor


def assert_as_accurate(result: Tensor, exact: Tensor, peer: Tensor, *, slack: float = 1) -> None:
    """`result` is no further from the float64 `exact` than `peer`, PyTorch's own path in the same dtype.

    One rounding of the largest value is granted: on a short input the peer may be right by luck. `slack` times the
    peer's error is for a caller who says why.
    """
    assert result.shape == exact.shape == peer.shape and result.dtype == peer.dtype and exact.dtype == torch.float64
    if not exact.numel():
        return
    error, peer_error = ((x.double().cpu() - exact.cpu()).abs().max().item() for x in (result, peer))
    rounding = torch.finfo(result.dtype).eps * exact.abs().max().item()
    assert error <= slack * max(peer_error, rounding), (
        f"off by {error:.3g}, PyTorch by {peer_error:.3g}, {rounding=:.3g}"
    )
