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


def assert_no_further(result: Tensor, exact: Tensor, peer: Tensor) -> None:
    """A float64 result agrees to 1e-12, far below a float32 rounding anywhere on its path. For the other dtypes, in the
    mean square, `result` is as close to the float64 `exact` as PyTorch's float32 path, and one rounding.

    The maximum of a few roundings is a matter of luck; the upstream gradients, whose terms cancel, are of order 1.
    """
    assert torch.isfinite(result).all() and result.shape == exact.shape
    if result.dtype == torch.float64:
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)
        return
    error, peer_error, size = ((x.double() - y).norm() for x, y in ((result, exact), (peer, exact), (exact, 0 * exact)))
    rounding = torch.finfo(result.dtype).eps * max(size, result.numel() ** 0.5)
    assert error <= 1.1 * peer_error + rounding, f"off by {error:.3g}, PyTorch by {peer_error:.3g}, {rounding=:.3g}"


def head_limit(depth: int, largest: float) -> float:
    """How far a field of a head of 16-bit inputs may be off on tensor cores: 2e-5, as on a CPU, and D/16 2^-24 |z|.

    They add 16 products at a time to a float32 accumulator which they truncate, on average by half a unit of its last
    place and always towards zero. `largest`: |z|, the largest |hidden . weight| / temperature.
    """
    return 2e-5 + depth / 16 * 2**-24 * largest


def assert_as_tensor_cores(result: Tensor, exact: Tensor, peer: Tensor, limit: float) -> None:
    """Within `limit` of the float64 `exact`, or no further than `peer`, which has the GPU's own product in float32."""
    error, peer_error = ((x.double().cpu() - exact.cpu()).abs().max().item() for x in (result, peer))
    rounding = torch.finfo(result.dtype).eps * exact.abs().max().item()
    assert error <= max(limit, 1.1 * peer_error + rounding), f"off by {error:.3g}, {peer_error=:.3g}, {limit=:.3g}"
