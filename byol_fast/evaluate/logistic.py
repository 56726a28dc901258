"""Multinomial logistic regression by L-BFGS, and the selection of its regularization."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from byol_fast.evaluate.metrics import MAX_LOGITS, accuracy, classify
from byol_fast.evaluate.splits import train_val_split
from byol_fast.utils.precision import fp32_matmul

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""L-BFGS stops if no entry of the preconditioned gradient is larger; the loss is then within about its square."""
MAX_ITERATIONS = 300
MAX_WORSE_IN_A_ROW = 3
"""A sweep stops after this many candidates in a row that do not improve the accuracy."""

MAX_MEAN = 1e3
"""Largest mean of a feature, in standard deviations, of which the product of weights and features has digits enough;
those of a nearly collapsed encoder have a larger one."""

HISTORY = 20
"""Steps that L-BFGS remembers."""
COPIES_IN_FIT = 2 * HISTORY + 6
"""Tensors of the size of the weights that a fit has in memory."""

_CHUNK_ROWS = 1 << 16
"""Number of rows whose logits are in memory at a time; fewer with so many classes that they exceed `MAX_LOGITS`."""


@dataclass(frozen=True, slots=True, eq=False)
class LogisticModel:
    """A fitted multinomial logistic regression: `logits = ((x - mean) / scale) @ weight.T + bias`."""

    weight: Tensor
    """For standardized features `[C, D]`."""
    bias: Tensor
    """`[C]`."""
    mean: Tensor
    """Mean of the features it was fitted on `[D]`."""
    scale: Tensor
    """Standard deviation of these features `[D]`; 1 for those that vary less than a millionth of the one that varies
    most."""
    l2: float
    iterations: int
    converged: bool
    """True if the gradient reached the tolerance."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[N, C]` of features `[N, D]`."""
        if bool((self.mean.abs() > MAX_MEAN * self.scale).any()):
            return torch.addmm(self.bias, (x - self.mean) / self.scale, self.weight.T)
        weight = self.weight / self.scale
        return torch.addmm(self.bias - weight @ self.mean, x, weight.T)


class LogisticProblem:
    """Multinomial logistic regression on fixed features, for any number of regularization strengths.

    Minimizes `mean cross-entropy + l2 / 2 * |weight|^2` over weight and bias, on features standardized to mean 0 and
    standard deviation 1: scikit-learn's `LogisticRegression(C=1 / (l2 * N))`.

    L-BFGS optimizes v in `weight = v @ V.T / sqrt(eigenvalues / C + l2)` with the eigenvectors V of the features'
    covariance. With this preconditioning the Hessian at 0 is about 1 in every direction, and tens of iterations are
    enough instead of hundreds.

    Args:
        x: features `[N, D]`, fp32 or float64.
        y: classes `[N]`, int64, on the same device.
        num_classes: C.

    Raises:
        ValueError: there are no features, or the shapes do not match.
    """

    def __init__(self, x: Tensor, y: Tensor, *, num_classes: int) -> None:
        if x.ndim != 2 or len(x) == 0 or y.shape != x.shape[:1]:
            raise ValueError(
                "logistic regression: x and y must be [N, D] and [N] with N of 1 or more, got "
                f"{list(x.shape)} and {list(y.shape)}"
            )
        self.y, self.num_classes = y, num_classes
        self.mean = x.mean(dim=0)
        scale = x.std(dim=0, correction=0)
        self.scale = torch.where(scale > 1e-6 * scale.max().clamp_min(1e-30), scale, 1)
        standardized = (x - self.mean) / self.scale
        eigenvalues, self.vectors = torch.linalg.eigh(standardized.T @ standardized / len(x))
        self.eigenvalues = eigenvalues.clamp_min(0)
        self.rotated = standardized @ self.vectors

    def fit(
        self,
        l2: float,
        *,
        start: LogisticModel | None = None,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> LogisticModel:
        """Fit with one regularization strength.

        Args:
            l2: zero or more.
            start: initial model, of these or other features of this size; None: zeros.
            tolerance: largest entry of the preconditioned gradient at which L-BFGS stops.
            max_iterations: largest number of L-BFGS iterations.
        """
        # --- preconditioner: the inverse root of the Hessian's diagonal at 0, in the basis of the eigenvectors
        curvature = self.eigenvalues / self.num_classes
        curvature = curvature + max(l2, 1e-6 * float(curvature.max()), 1e-30)
        # The last column is the bias, whose feature is 1.
        factors = torch.cat([curvature, curvature.new_full((1,), 1 / self.num_classes)]).rsqrt()
        # --- initial weights, from the standardization of `start` to this one
        v = self.rotated.new_zeros(self.num_classes, len(factors))
        if start is not None:
            v[:, :-1] = (start.weight * (self.scale / start.scale)) @ self.vectors
            v[:, -1] = start.bias + start.weight @ ((self.mean - start.mean) / start.scale)
            v /= factors
        v.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [v],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=0.1 * tolerance**2,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self._loss_and_gradient(v.detach() * factors, l2)
            v.grad = gradient * factors
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        weights = v.detach() * factors
        iterations = int(optimizer.state[v]["n_iter"])
        return LogisticModel(
            weight=weights[:, :-1] @ self.vectors.T,
            bias=weights[:, -1].clone(),
            mean=self.mean,
            scale=self.scale,
            l2=l2,
            iterations=iterations,
            converged=iterations < max_iterations,
        )

    def _loss_and_gradient(self, weights: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """Loss and its gradient, chunk by chunk.

        Autograd would keep the logits of all images twice: 4 GB each for a million images and a thousand classes.
        """
        weight, bias = weights[:, :-1], weights[:, -1]
        loss = 0.5 * l2 * weight.double().square().sum()
        gradient = torch.zeros_like(weights)
        gradient[:, :-1] = l2 * weight
        sample_weight = 1 / len(self.rotated)
        chunk = max(min(_CHUNK_ROWS, MAX_LOGITS // self.num_classes), 1)
        for rows, labels in zip(torch.split(self.rotated, chunk), torch.split(self.y, chunk), strict=True):
            log_p = F.log_softmax(torch.addmm(bias, rows, weight.T), dim=1)
            loss = loss - sample_weight * log_p.gather(1, labels[:, None]).double().sum()
            error = log_p.exp_()
            error.scatter_add_(1, labels[:, None], error.new_full((len(labels), 1), -1.0))
            gradient[:, :-1].addmm_(error.T, rows, alpha=sample_weight)
            gradient[:, -1].add_(error.sum(dim=0), alpha=sample_weight)
        return loss, gradient


@dataclass(frozen=True, slots=True, eq=False)
class LogisticSweep:
    """Result of `sweep_logistic`."""

    model: LogisticModel
    """Fitted on all images with the best candidate."""
    candidates: tuple[tuple[float, float], ...]
    """Each l2 that was tried, ascending, and its accuracy on held-out images; empty with a single candidate."""
    num_held_out: int


@fp32_matmul()
def sweep_logistic(
    views: Sequence[Tensor],
    y: Tensor,
    *,
    num_classes: int,
    l2: Sequence[float],
    held_out: float,
    seed: int,
    on_fit: Callable[[int, str], None] = lambda *_: None,
) -> LogisticSweep:
    """Select the regularization on held-out training images, then fit all training images with it.

    Args:
        views: features of the training images `[N, D]`, of one or more views (mirrored); images are held out in all.
        y: classes `[N]`.
        num_classes: C.
        l2: candidates.
        held_out: share of each class that is held out.
        seed: of the split.
        on_fit: called with the number of fits so far and a description of the last one.
    """
    strengths = sorted(set(l2), reverse=True)
    candidates: list[tuple[float, float]] = []
    num_held_out = 0
    best: LogisticModel | None = None
    if len(strengths) > 1:
        parts = train_val_split(y.cpu().numpy(), held_out, seed=seed)
        train, val = (torch.from_numpy(part).to(y.device) for part in parts)
        problem = LogisticProblem(
            torch.cat([view[train] for view in views]), y[train].repeat(len(views)), num_classes=num_classes
        )
        best, candidates = _best_model(problem, views[0][val], y[val], strengths, on_fit)
        num_held_out = len(val)
        del problem  # as large as the features
    problem = LogisticProblem(torch.cat(list(views)), y.repeat(len(views)), num_classes=num_classes)
    final = problem.fit(strengths[0] if best is None else best.l2, start=best)
    if not final.converged:
        log.warning("L-BFGS did not converge in %d iterations; the accuracy may be slightly lower", MAX_ITERATIONS)
    return LogisticSweep(final, tuple(reversed(candidates)), num_held_out)


def _best_model(
    problem: LogisticProblem,
    val_x: Tensor,
    val_y: Tensor,
    strengths: Sequence[float],
    on_fit: Callable[[int, str], None],
) -> tuple[LogisticModel, list[tuple[float, float]]]:
    """The model with the highest accuracy on held-out images, and the accuracy by l2.

    Each fit starts from the last one. Weak regularization takes longest, so the sweep goes from strong to weak and
    stops early.
    """
    candidates: list[tuple[float, float]] = []
    model: LogisticModel | None = None
    best: LogisticModel | None = None
    best_accuracy, num_worse = -1.0, 0
    for number, l2 in enumerate(strengths, 1):
        model = problem.fit(l2, start=model)
        val_accuracy = accuracy(classify(model.logits, val_x, problem.num_classes), val_y)
        candidates.append((l2, val_accuracy))
        on_fit(number, f"l2 {l2:.3g}: {val_accuracy:.1%}, {model.iterations} iterations")
        if val_accuracy > best_accuracy:  # the stronger one if equal
            best, best_accuracy, num_worse = model, val_accuracy, 0
        else:
            num_worse += 1
        if num_worse == MAX_WORSE_IN_A_ROW:
            break
    assert best is not None
    is_tied = sum(value == best_accuracy for _, value in candidates) > 1  # then nothing suggests values beyond the edge
    if best.l2 in (strengths[0], strengths[-1]) and not is_tied:
        log.warning("the best l2, %g, is at the edge of its candidates: values beyond it may be better", best.l2)
    return best, candidates
