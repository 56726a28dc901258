"""Running statistics of batch norms: against torch's own batch norm call by call; skipped steps; invalid input."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_kernels import update_running_stats_
from tests.kernels.conftest import not_interpreted
from tests.kernels.numerics import randn

# C of each layer: one channel, an odd number, a block and one more than a block of the kernel.
CHANNELS = [1, 67, 1024, 1025, 8]


class Layers:
    """Batch norms and the inputs `[V, N, C]` that their statistics are of."""

    def __init__(self, device: str, dtype: torch.dtype, num_splits: int = 2, **options: Any) -> None:
        self.norms = [nn.BatchNorm1d(c, **options).to(device, dtype) for c in CHANNELS]
        inputs = [randn((num_splits, 6, c), i, torch.float64) for i, c in enumerate(CHANNELS)]
        self.inputs = [(x * (1 + i) - i).to(device, dtype) for i, x in enumerate(inputs)]

    def statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        """Means and unbiased variances `[V, C]`, by torch."""
        both = [torch.var_mean(x, 1, correction=1) for x in self.inputs]
        return [mean.contiguous() for _, mean in both], [var.contiguous() for var, _ in both]

    def update_by_torch(self) -> None:
        """Update the running statistics in torch's forward pass, call by call."""
        for norm, x in zip(self.norms, self.inputs, strict=True):
            for split in x:
                norm(split)

    def update_by_operator(self, found_inf: Tensor | None = None) -> None:
        means, variances = self.statistics()
        update_running_stats_(
            [norm.running_mean for norm in self.norms],  # type: ignore[misc]
            [norm.running_var for norm in self.norms],  # type: ignore[misc]
            means,
            variances,
            [norm.num_batches_tracked for norm in self.norms],
            [norm.momentum for norm in self.norms],
            found_inf=found_inf,
        )

    def buffers(self) -> list[Tensor]:
        return [b.clone() for norm in self.norms for b in norm.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_two_steps_match_torch(device: str, dtype: torch.dtype, num_splits: int, momentum: float | None) -> None:
    layers, expected = (Layers(device, dtype, num_splits, momentum=momentum) for _ in range(2))
    for _ in range(2):
        layers.update_by_operator()
        expected.update_by_torch()
    for a, b in zip(layers.buffers(), expected.buffers(), strict=True):
        # A handful of roundings a step; the means are sums of six numbers that may cancel.
        torch.testing.assert_close(a, b, rtol=2e-6 if dtype == torch.float32 else 1e-7, atol=2e-6, check_dtype=True)
    assert all(norm.num_batches_tracked == 2 * num_splits for norm in layers.norms)


def test_layers_of_different_options_match_torch(device: str) -> None:
    """Each layer has its own momentum, number of batches and counter."""
    layers, expected = Layers(device, torch.float64), Layers(device, torch.float64)
    for x in (layers, expected):
        for norm, momentum in zip(x.norms, (0.5, None, 0.0, 1.0, 0.1), strict=True):
            norm.momentum = momentum
        x.norms[0].num_batches_tracked = None
        x.inputs[3] = x.inputs[3][:1]
    layers.update_by_operator()
    expected.update_by_torch()
    for a, b in zip(layers.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_skipped_step_writes_nothing(device: str, poison: float) -> None:
    """Selected, not multiplied: 0 * NaN would be NaN."""
    layers = Layers(device, torch.float32)
    layers.update_by_operator(torch.zeros((), device=device))
    before = layers.buffers()
    layers.inputs[1][1, 2, 3] = poison
    layers.update_by_operator(torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(layers.buffers(), before, strict=True))
    layers.update_by_operator(torch.zeros((), device=device))
    mean = layers.norms[1].running_mean
    assert mean is not None and not torch.isfinite(mean[3]) and torch.isfinite(mean[:3]).all()


def test_invalid_lists_raise_before_any_write(device: str) -> None:
    layers = Layers(device, torch.float32)
    before = layers.buffers()
    means, variances = layers.statistics()
    arguments: dict[str, Any] = {
        "running_mean": [norm.running_mean for norm in layers.norms],
        "running_var": [norm.running_var for norm in layers.norms],
        "batch_mean": means,
        "batch_var": variances,
        "num_batches_tracked": [norm.num_batches_tracked for norm in layers.norms],
        "momentum": [0.1] * len(CHANNELS),
    }

    def raises(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            update_running_stats_(**(arguments | changes))

    raises("running_var must have an entry for each of the 5 layers", running_var=arguments["running_var"][:-1])
    raises(r"batch_mean\[1\] must be contiguous and \[V, C\]", batch_mean=[means[0], means[0], *means[2:]])
    raises(r"batch_mean\[4\] must be contiguous", batch_mean=[*means[:4], means[4].t().contiguous().t()])
    raises(r"batch_var\[2\] must have as many rows", batch_var=[*variances[:2], variances[2][:1], *variances[3:]])
    raises("must be an int64 scalar", num_batches_tracked=[torch.zeros((), device=device)] + [None] * 4)
    raises("must be a counter where momentum is None", num_batches_tracked=[None] * 5, momentum=[None] * 5)
    raises("must not share memory", running_var=arguments["running_mean"])
    raises("found_inf must be a scalar", found_inf=torch.zeros(2, device=device))
    assert all(torch.equal(a, b) for a, b in zip(layers.buffers(), before, strict=True))
    update_running_stats_([], [], [], [], [], [])


@not_interpreted
def test_operator_checks(device: str) -> None:
    layers = Layers(device, torch.float32)
    means, variances = layers.statistics()
    running: list[Any] = [[getattr(norm, name) for norm in layers.norms] for name in ("running_mean", "running_var")]
    counters = [norm.num_batches_tracked for norm in layers.norms]
    operator = torch.ops.byol_kernels.update_running_stats_.default
    for found_inf in (None, torch.ones((), device=device)):
        torch.library.opcheck(operator, (*running, means, variances, counters, list(range(5)), [0.1] * 5, found_inf))
