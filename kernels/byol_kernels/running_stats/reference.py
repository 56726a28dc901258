"""Running statistics of batch normalization in plain PyTorch: the CPU path, and in float64 the oracle of the kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update_running_stats_(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batch_mean: Sequence[Tensor],
    batch_var: Sequence[Tensor],
    counters: Sequence[Tensor],
    counter_rows: Sequence[int],
    momentum: Sequence[float],
) -> None:
    """Update running statistics of batch norms with those of one or several batches, in place.

    Args:
        running_mean: [C] per layer.
        running_var: likewise.
        batch_mean: [V, C] per layer.
        batch_var: likewise.
        counters: of batches, int64 scalars.
        counter_rows: the layer of each counter.
        momentum: per layer; negative for the cumulative average.
    """
    counts = {row: int(counter) for row, counter in zip(counter_rows, counters, strict=True)}
    # Layers of one factor are updated together; that of the cumulative average depends on the layer's counter.
    for split in range(max(map(len, batch_mean))):
        by_factor: dict[float, list[int]] = {}
        for row, value in enumerate(momentum):
            if split < len(batch_mean[row]):
                by_factor.setdefault(value if value >= 0.0 else 1.0 / (counts[row] + split + 1), []).append(row)
        for factor, rows in by_factor.items():
            running = [column[row] for column in (running_mean, running_var) for row in rows]
            batch = [column[row][split] for column in (batch_mean, batch_var) for row in rows]
            torch._foreach_mul_(running, 1.0 - factor)
            torch._foreach_add_(running, batch, alpha=factor)
    for row, counter in zip(counter_rows, counters, strict=True):
        counter.add_(len(batch_mean[row]))
