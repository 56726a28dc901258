"""A linear classifier on a frozen encoder: logistic regression on features, and SGD on augmented images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.evaluate.metrics import accuracy
from byol_fast.evaluate.splits import hold_out
from byol_fast.optim.schedules import lr_at

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""L-BFGS ends where no entry of the preconditioned gradient is larger; its square is about what the loss lacks."""
MAX_ITERATIONS = 300
WORSE_IN_A_ROW = 3
"""A sweep ends after so many candidates in a row that are no better than an earlier one."""

_ROWS = 1 << 16
"""Rows of features that logits are computed of at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class LogisticModel:
    """A fitted multinomial logistic regression: `logits = ((x - mean) / scale) @ weight.T + bias`."""

    weight: Tensor
    """`[C, D]`, of standardised features."""
    bias: Tensor
    """`[C]`."""
    mean: Tensor
    """Of the features it was fitted on `[D]`."""
    scale: Tensor
    """Their standard deviation, 1 where that is 0 `[D]`."""
    l2: float
    iterations: int
    converged: bool
    """Whether the gradient became as small as asked for."""

    def logits(self, x: Tensor) -> Tensor:
        """Of features `[N, D]`: `[N, C]`."""
        weight = self.weight / self.scale
        return torch.addmm(self.bias - weight @ self.mean, x, weight.T)


class LogisticProblem:
    """Multinomial logistic regression on some features; fits any number of regularisations.

    Minimises `mean cross-entropy + l2 / 2 * |weight|^2` over weight and bias, on features standardised to mean 0 and
    standard deviation 1. That is scikit-learn's `LogisticRegression(C=1 / (l2 * N))` on them.

    L-BFGS works on `weight = v @ V.T / sqrt(eigenvalues / C + l2)` with the eigenvectors V of the features' covariance:
    the Hessian at 0 is then about 1 in every direction, and tens of iterations do what takes hundreds without.

    Args:
        x: features `[N, D]`, fp32 or float64.
        y: classes `[N]`, int64, on the same device.
        num_classes: C.

    Raises:
        ValueError: there are no features, or not one class for each.
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
        standard = (x - self.mean) / self.scale
        eigenvalues, self.vectors = torch.linalg.eigh(standard.T @ standard / len(x))
        self.eigenvalues = eigenvalues.clamp_min(0)
        self.rotated = standard @ self.vectors

    def fit(
        self,
        l2: float,
        *,
        start: LogisticModel | None = None,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> LogisticModel:
        """Fit one regularisation.

        Args:
            l2: zero or more.
            start: where to begin, a model of these or other features of this size; zeros when None.
            tolerance: largest entry of the preconditioned gradient at the end.
            max_iterations: of L-BFGS.
        """
        curvature = self.eigenvalues / self.num_classes
        curvature = curvature + max(l2, 1e-6 * float(curvature.max()), 1e-30)
        # The last column is the bias; its feature is 1.
        factors = torch.cat([curvature, curvature.new_full((1,), 1 / self.num_classes)]).rsqrt()
        free = self.rotated.new_zeros(self.num_classes, len(factors))
        if start is not None:
            free[:, :-1] = (start.weight * (self.scale / start.scale)) @ self.vectors
            free[:, -1] = start.bias + start.weight @ ((self.mean - start.mean) / start.scale)
            free /= factors
        free.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=0.1 * tolerance**2,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self._loss_and_gradient(free.detach() * factors, l2)
            free.grad = gradient * factors
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        found = free.detach() * factors
        iterations = int(optimizer.state[free]["n_iter"])
        return LogisticModel(
            weight=found[:, :-1] @ self.vectors.T,
            bias=found[:, -1].clone(),
            mean=self.mean,
            scale=self.scale,
            l2=l2,
            iterations=iterations,
            converged=iterations < max_iterations,
        )

    def _loss_and_gradient(self, weights: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """By hand and in pieces: a million images and a thousand classes would be 4 GB of logits, twice."""
        weight, bias = weights[:, :-1], weights[:, -1]
        loss = 0.5 * l2 * weight.double().square().sum()
        gradient = torch.zeros_like(weights)
        gradient[:, :-1] = l2 * weight
        share = 1 / len(self.rotated)
        for rows, truth in zip(torch.split(self.rotated, _ROWS), torch.split(self.y, _ROWS), strict=True):
            log_p = F.log_softmax(torch.addmm(bias, rows, weight.T), dim=1)
            loss = loss - share * log_p.gather(1, truth[:, None]).double().sum()
            error = log_p.exp()
            error.scatter_add_(1, truth[:, None], error.new_full((len(truth), 1), -1.0))
            gradient[:, :-1].addmm_(error.T, rows, alpha=share)
            gradient[:, -1].add_(error.sum(dim=0), alpha=share)
        return loss, gradient


@dataclass(frozen=True, slots=True, eq=False)
class LogisticSweep:
    """The outcome of `sweep_logistic`."""

    model: LogisticModel
    """Fitted on all images with the best candidate."""
    candidates: tuple[tuple[float, float], ...]
    """Each l2 that was tried, rising, and its accuracy on the images held out; none where there was no choice."""
    num_held_out: int


def sweep_logistic(
    views: Sequence[Tensor],
    y: Tensor,
    *,
    num_classes: int,
    l2: Sequence[float],
    held_out: float,
    seed: int,
    tell: Callable[[int, str], None] = lambda *_: None,
) -> LogisticSweep:
    """Choose the regularisation on a held-out part of the training images, then fit all of them.

    From strong to weak, each fit begins where the last one ended; after three candidates in a row that are no better
    than an earlier one the rest, which take longest, is left out.

    Args:
        views: features of the training images `[N, D]`, once or more often (mirrored); an image is held out in all.
        y: classes `[N]`.
        num_classes: C.
        l2: candidates.
        held_out: share of each class that is held out.
        seed: of the split.
        tell: is told how many fits are done, and of the last one.
    """
    downwards = sorted(set(l2), reverse=True)
    candidates: list[tuple[float, float]] = []
    num_held_out = 0
    start: LogisticModel | None = None
    chosen = downwards[0]
    if len(downwards) > 1:
        fit, held = (torch.from_numpy(part).to(y.device) for part in hold_out(y.cpu().numpy(), held_out, seed=seed))
        part = LogisticProblem(
            torch.cat([view[fit] for view in views]), y[fit].repeat(len(views)), num_classes=num_classes
        )
        held_x, held_y, num_held_out = views[0][held], y[held], len(held)
        model: LogisticModel | None = None
        best, worse = -1.0, 0
        for number, strength in enumerate(downwards, 1):
            model = part.fit(strength, start=model)
            right = accuracy(model.logits(held_x), held_y)
            candidates.append((strength, right))
            tell(number, f"l2 {strength:.3g}: {right:.1%}, {model.iterations} iterations")
            if right > best:  # of equals the stronger
                best, start, worse = right, model, 0
            else:
                worse += 1
            if worse == WORSE_IN_A_ROW:
                break
        del part
        assert start is not None
        chosen = start.l2
        tied = sum(right == best for _, right in candidates) > 1  # a weaker one is as good: nothing points beyond
        if chosen in (downwards[0], downwards[-1]) and not tied:
            log.warning("the best l2, %g, is at the edge of its candidates: others beyond it may be better", chosen)
    everything = LogisticProblem(torch.cat(list(views)), y.repeat(len(views)), num_classes=num_classes)
    final = everything.fit(chosen, start=start)
    if not final.converged:
        log.warning(
            "L-BFGS has not converged after %d iterations; the classifier may be a little worse", MAX_ITERATIONS
        )
    return LogisticSweep(final, tuple(reversed(candidates)), num_held_out)


class Heads(nn.Module):
    """Linear classifiers that learn from the same features, each at its own rate.

    Args:
        dim: size of the features.
        num_classes: outputs of each.
        lr: peak learning rate of each, for a batch of 256.
        generator: of the first weights, which all of them share: a normal distribution cut off at two standard
            deviations of 1 / sqrt(dim), as the reference's; biases are 0.
    """

    def __init__(self, dim: int, num_classes: int, lr: Sequence[float], generator: torch.Generator) -> None:
        super().__init__()
        weight = truncated_normal(num_classes, dim, generator)
        self.lr = tuple(lr)
        self.layers = nn.ModuleList(nn.Linear(dim, num_classes) for _ in lr)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.data.copy_(weight)
            layer.bias.data.zero_()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of each."""
        return [layer(x) for layer in self.layers]

    def optimizer(self) -> torch.optim.SGD:
        """One group for each head; `set_rates` sets their rates."""
        groups = [{"params": list(layer.parameters())} for layer in self.layers]
        return nesterov(groups)

    def set_rates(self, optimizer: torch.optim.SGD, step: int, total: int, batch_size: int) -> None:
        """Cosine to 0 without warm-up, scaled with the batch."""
        for group, lr in zip(optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr_at(step, total, 0, lr, batch_size)


def truncated_normal(num_classes: int, dim: int, generator: torch.Generator) -> Tensor:
    """First weights of a classifier `[C, D]`, as haiku's Linear has them."""
    std = 1 / math.sqrt(dim)
    return nn.init.trunc_normal_(torch.empty(num_classes, dim), std=std, a=-2 * std, b=2 * std, generator=generator)


def nesterov(parameters: object) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9 and no weight decay: the reference's for evaluations."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True)  # type: ignore[arg-type]
