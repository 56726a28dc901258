"""Logistic regression and the selection of its regularization."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from byol_fast.evaluate.logistic import LogisticProblem, sweep_logistic
from byol_fast.evaluate.metrics import predict


def features(count: int, seed: int, dim: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Correlated, skewed features of very different sizes, one of them constant, and noisy classes; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight = torch.randn(dim, classes, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    x = (torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix).relu()
    noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    y = (x @ weight + 4 * noise).argmax(dim=1)
    x = x * torch.logspace(-3, 3, dim, dtype=torch.float64)
    x[:, 4] = 2.5
    return x, y


@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_logistic_regression_equals_scikit_learn(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, y = features(500, 0)
    ours = LogisticProblem(x, y, num_classes=5).fit(l2, tolerance=1e-9)
    standardized = ((x - ours.mean) / ours.scale).numpy()
    theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000, solver="newton-cg")
    theirs.fit(standardized, y.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-5 * np.abs(theirs.coef_).max() + 1e-9)
    test_x, _ = features(200, 1)
    expected = theirs.decision_function((test_x.numpy() - ours.mean.numpy()) / ours.scale.numpy())
    logits = ours.logits(test_x).numpy()
    # Logits are the same up to a constant for each sample.
    logits, expected = (a - a.mean(axis=1, keepdims=True) for a in (logits, expected))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": lambda x: torch.full_like(x, 0.7),
    "zeros": torch.zeros_like,
    "nearly_collapsed": lambda x: 1 + 1e-5 * x,
    "collapsed_to_rounding": lambda x: 1 + 1e-7 * x,
    "offset": lambda x: x + 1e7,
    "one_constant": lambda x: torch.cat([x[:, :7], torch.full_like(x[:, :1], 5.3)], dim=1),
    "duplicates": lambda x: x[:, [0, 0, 1, 1, 2, 2]],
    "one_dimension": lambda x: x[:, :1],
    "fewer_images_than_dimensions": lambda x: x.repeat(1, 40) + torch.linspace(0, 99, 320 * len(x)).sin().view(-1, 320),
    "large": lambda x: 1e15 * x / x.abs().max(),
    "small": lambda x: 1e-10 * x,
    "one_outlier": lambda x: torch.zeros_like(x).index_fill(0, torch.tensor([3]), 1e10),
    "equal_images": lambda x: x[:8].repeat(30, 1),
}


@pytest.mark.parametrize("change", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("num_classes", [4, 300])  # 296 of them without images
def test_accuracy_on_degenerate_features_equals_scikit_learn(
    change: Callable[[Tensor], Tensor], num_classes: int
) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    preprocessing = pytest.importorskip("sklearn.preprocessing", reason="scikit-learn is not installed")
    y = torch.arange(240) % 4
    centers = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    x = change(centers[y] + 1.5 * torch.randn(240, 8, generator=torch.Generator().manual_seed(0)))
    model = LogisticProblem(x, y, num_classes=num_classes).fit(1e-2)
    assert model.converged
    standardized = preprocessing.StandardScaler().fit_transform(x.double().numpy())
    theirs = linear_model.LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-10, max_iter=5000)
    expected = theirs.fit(standardized, y.numpy()).score(standardized, y.numpy())
    assert float((predict(model.logits(x)) == y).double().mean()) == pytest.approx(expected, abs=1e-12)


def test_minimum_is_stationary_and_independent_of_start() -> None:
    (x, y), (other_x, other_y) = features(300, 0), features(200, 1)
    other_model = LogisticProblem(other_x, other_y, num_classes=5).fit(1e-3)
    problem = LogisticProblem(x, y, num_classes=5)
    model = problem.fit(0.02, tolerance=1e-10)
    weight, bias = model.weight.clone().requires_grad_(), model.bias.clone().requires_grad_()
    logits = ((x - model.mean) / model.scale) @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, y) + 0.01 * weight.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-7
    again = problem.fit(0.02, start=other_model, tolerance=1e-10)
    torch.testing.assert_close(again.weight, model.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.logits(x), logits.detach())
    single = LogisticProblem(x.float(), y, num_classes=5).fit(0.02)
    assert single.converged
    assert (single.logits(x.float()).argmax(1) == model.logits(x).argmax(1)).double().mean() > 0.99


def test_start_keeps_classifier_of_other_features() -> None:
    (x, y), (other_x, other_y) = features(300, 0), features(200, 1)
    model = LogisticProblem(x, y, num_classes=5).fit(0.02)
    unmoved = LogisticProblem(other_x, other_y, num_classes=5).fit(0.02, start=model, max_iterations=0)
    torch.testing.assert_close(unmoved.logits(x), model.logits(x))


def test_chunks_of_rows_give_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(100, 0)
    whole = LogisticProblem(x, y, num_classes=5).fit(0.1, tolerance=1e-10)
    for name, value in (("_CHUNK_ROWS", 7), ("MAX_LOGITS", 15), ("MAX_LOGITS", 1)):
        monkeypatch.setattr(f"byol_fast.evaluate.logistic.{name}", value)
        pieces = LogisticProblem(x, y, num_classes=5).fit(0.1, tolerance=1e-10)
        torch.testing.assert_close(pieces.weight, whole.weight, atol=1e-7, rtol=0)


def test_sweep_selects_best_on_images_held_out_in_all_views() -> None:
    """Noise features: a weak l2 learns them by heart. Were a held-out image's mirror learned from, weak would win."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 300, generator=generator) + 0.4 * torch.nn.functional.one_hot(y, 300)
    mirrored = x + 1e-3 * torch.randn(120, 300, generator=generator)
    sweep = sweep_logistic([x, mirrored], y, num_classes=3, l2=(1e-5, 3.0, 30.0), held_out=0.3, seed=0)
    best = max(accuracy for _, accuracy in sweep.candidates)
    assert sweep.model.l2 == max(l2 for l2, accuracy in sweep.candidates if accuracy == best)
    assert best < 0.9
    assert sweep.num_held_out == 36
    expected = LogisticProblem(torch.cat([x, mirrored]), y.repeat(2), num_classes=3).fit(sweep.model.l2)
    torch.testing.assert_close(sweep.model.logits(x), expected.logits(x), atol=2e-3, rtol=0)


def test_single_candidate_holds_out_nothing() -> None:
    x, y = features(60, 0)
    sweep = sweep_logistic([x], y, num_classes=5, l2=(0.1,), held_out=0.2, seed=0)
    assert (sweep.num_held_out, sweep.candidates) == (0, ())
    torch.testing.assert_close(sweep.model.weight, LogisticProblem(x, y, num_classes=5).fit(0.1).weight)
