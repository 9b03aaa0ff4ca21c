"""The dtypes of results."""

import torch


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which an op on `dtype` accumulates and gives its results: float64 for float64, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
