"""Check that the candidates of a step comparison compute the same values, before any of them is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from byol_fast.bench.baseline import BaselineStep
from byol_fast.bench.byol_fast_step import ByolFastStep
from byol_fast.bench.candidates import STEPS, library_candidates
from byol_fast.bench.flags import EXACT
from byol_fast.bench.numerics import relative_error
from byol_fast.bench.problem import Problem


def check_agreement(problem: Problem) -> list[str]:
    """Compare byol_fast with the baseline in float64, and the losses of the libraries with the baseline's.

    On four images, because the result does not depend on their number. TF32 is off: it would differ by more than is
    allowed here.

    Returns:
        A line for each comparison.

    Raises:
        AssertionError: a difference exceeds its bound.
    """
    EXACT.apply()
    small = dataclasses.replace(problem, batch_size=4, hidden_dim=64)
    lines = _compare_weights(small)

    expected_loss, mixed_loss = BaselineStep(small)(), BaselineStep(small, concat=True)()
    lines.append(_compare_loss("byol_fast, fp32", ByolFastStep(small)(), expected_loss, 1e-4))
    # Factor and constant that turn a library's loss into the baseline's, and the baseline that it belongs to.
    scales = {
        "lightly": (4, 4, expected_loss),
        "stable-pretraining": (2, 0, expected_loss),
        "byol-pytorch": (1, 0, mixed_loss),
    }
    for name, candidate in library_candidates(torch.device(problem.device)).items():
        if name in scales and candidate.is_installed:
            factor, constant, expected = scales[name]
            loss = STEPS[candidate.step](small, **candidate.options)()
            lines.append(_compare_loss(name, factor * loss + constant, expected, 1e-4))
    return lines


def _compare_weights(problem: Problem) -> list[str]:
    """Losses, weights and statistics after two steps of SGD in float64."""
    baseline = BaselineStep(problem, dtype=torch.float64)
    candidate = ByolFastStep(problem, dtype=torch.float64, optimizer="sgd")
    lines = [_compare_loss("byol_fast, float64", candidate(), baseline(), 1e-11) for _ in range(2)]
    online = [*baseline.online.parameters(), *baseline.predictor.parameters()]
    pairs: dict[str, tuple[Iterable[Tensor], Iterable[Tensor]]] = {
        "online weights": (candidate.model.online.parameters(), online),
        "target weights": (candidate.model.target.parameters(), baseline.target.parameters()),
        "target statistics": (candidate.model.target.buffers(), baseline.target.buffers()),
    }
    for name, (values, expected) in pairs.items():
        error = max(relative_error([a], [b]) for a, b in zip(values, expected, strict=True))
        lines.append(f"byol_fast and the baseline after 2 steps in float64, {name}: relative difference {error:.1e}")
        if not error < 1e-9:
            raise AssertionError(lines[-1])
    return lines


def _compare_loss(name: str, loss: Tensor, expected: Tensor, bound: float) -> str:
    error = relative_error([loss], [expected])
    line = f"loss of {name}: {float(loss):.6f}, baseline {float(expected):.6f}"
    if not error <= bound:
        raise AssertionError(f"{line}: relative difference {error:.1e}, allowed {bound:.0e}")
    return line
