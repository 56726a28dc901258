"""Floating-point dtypes that the operators take, and the dtype that they compute in."""

import torch

LOW_PRECISION_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*LOW_PRECISION_DTYPES, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic on tensors of `dtype`: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
