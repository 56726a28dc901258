"""Distance of tensors, for checks that candidates agree before they are timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """L2 distance of two lists of tensors over the norm of the second, each list as one vector.

    NaN if any value is NaN.
    """
    a, b = (torch.cat([t.detach().double().cpu().flatten() for t in tensors]) for tensors in (values, expected))
    distance = float((a - b).norm())
    return distance if distance == 0.0 else distance / max(float(b.norm()), 1e-30)
