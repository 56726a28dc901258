"""The parts of evaluations: intervals, subsets, nearest neighbours, logistic regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byol_fast.evaluate.knn import knn_predict, knn_rankings
from byol_fast.evaluate.linear import Heads, LogisticProblem, sweep_logistic
from byol_fast.evaluate.metrics import Z95, ranked, score, wilson
from byol_fast.evaluate.splits import balanced_subset, hold_out


@given(count=st.integers(1, 100_000), share=st.floats(0, 1))
@settings(deadline=None)
def test_wilsons_ends_are_where_the_score_test_rejects(count: int, share: float) -> None:
    """The interval holds the proportions q with |p - q| <= z sqrt(q (1 - q) / n): at its ends both sides are equal."""
    hits = round(share * count)
    p = hits / count
    for end in wilson(hits, count):
        assert 0 <= end <= 1
        assert math.isclose((p - end) ** 2, Z95**2 * end * (1 - end) / count, rel_tol=1e-6, abs_tol=1e-12)
    low, high = wilson(hits, count)
    assert low <= p <= high


def test_wilson_beside_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        np.testing.assert_allclose(wilson(hits, count), (low, high), atol=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_scores_count_what_they_say() -> None:
    names = [f"c{i}" for i in range(7)]
    ranking = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 2, 3, 4, 5], [6, 5, 4, 3, 2], [2, 3, 4, 5, 6]])
    labels = torch.tensor([0, 0, 6, 6, 1])
    found = score(ranking, labels, names)
    assert found.top1 == 2 / 5
    assert found.top5 == 3 / 5
    expected = np.zeros((7, 7), int)
    for truth, guess in ((0, 0), (0, 1), (6, 1), (6, 6), (1, 2)):
        expected[truth, guess] += 1
    np.testing.assert_array_equal(found.confusion, expected)
    assert [(c.name, c.count, c.accuracy) for c in found.per_class[:3]] == [
        ("c0", 2, 0.5),
        ("c1", 1, 0.0),
        ("c2", 0, None),
    ]
    assert found.per_class[6].ci95 == wilson(1, 2)


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_ranked_is_the_order_of_the_logits(classes: int) -> None:
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(0))
    expected = logits.numpy().argsort(axis=1)[:, ::-1][:, :5]
    np.testing.assert_array_equal(ranked(logits).numpy(), expected)


# ---- subsets ------------------------------------------------------------------------------------------------------

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [200, 100, 30, 1]))


def test_every_class_gives_its_share_and_smaller_shares_are_parts_of_larger_ones() -> None:
    previous: set[int] = set()
    for share, counts in (
        (0.01, [2, 1, 1, 1]),
        (0.1, [20, 10, 3, 1]),
        (0.5, [100, 50, 15, 1]),
        (1.0, [200, 100, 30, 1]),
    ):
        index = balanced_subset(LABELS, share, seed=3)
        assert np.bincount(LABELS[index]).tolist() == counts
        assert len(set(index.tolist())) == len(index)
        assert previous <= set(index.tolist())
        previous = set(index.tolist())


def test_a_subset_depends_on_seed_and_class_alone() -> None:
    index = balanced_subset(LABELS, 0.1, seed=3)
    assert set(balanced_subset(LABELS, 0.1, seed=4)) != set(index)
    # Without class 0 the others' choice stays: the k-th image of a class is chosen as before.
    kept = np.flatnonzero(LABELS != 0)
    without = kept[balanced_subset(LABELS[kept], 0.1, seed=3)]
    assert set(without) == set(index[LABELS[index] != 0])


@pytest.mark.parametrize(("share", "counts"), [(0.1, [20, 10, 3, 0]), (0.001, [1, 1, 1, 0]), (0.5, [100, 50, 15, 0])])
def test_held_out_images_are_of_every_class_that_can_spare_some(share: float, counts: list[int]) -> None:
    fit, held = hold_out(LABELS, share, seed=1)
    assert sorted([*fit, *held]) == list(range(len(LABELS)))
    assert np.bincount(LABELS[held], minlength=4).tolist() == counts


def test_nothing_can_be_held_out_of_single_images() -> None:
    with pytest.raises(ValueError, match="no class has two"):
        hold_out(np.arange(5), 0.2, seed=0)


# ---- nearest neighbours -------------------------------------------------------------------------------------------


def clusters(count: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters in float64, and which each sample is of."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return torch.from_numpy(centres[y] + 1.5 * rng.normal(size=(count, dim))), torch.from_numpy(y)


def test_several_k_in_one_search_are_each_of_them_alone() -> None:
    (train_x, train_y), (test_x, _) = clusters(80, 6, 4, 0), clusters(30, 6, 4, 1)
    ks = (20, 1, 80)
    together = knn_rankings(train_x, train_y, test_x, ks=ks, temperature=0.1, num_classes=4, chunk=7)
    for k, ranking in zip(ks, together, strict=True):
        alone = knn_predict(train_x, train_y, test_x, k=k, temperature=0.1, num_classes=4)
        assert torch.equal(ranking, alone)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    (train_x, train_y), (test_x, _) = clusters(600, 16, 10, 0), clusters(300, 16, 10, 1)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    theirs.fit(train_x.numpy(), train_y.numpy())
    ours = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=10)
    np.testing.assert_array_equal(ours[:, 0].numpy(), theirs.predict(test_x.numpy()))


@pytest.mark.peers
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_agrees_with_lightly(k: int, temperature: float) -> None:
    benchmarking = pytest.importorskip("lightly.utils.benchmarking", reason="lightly is not installed")
    (train_x, train_y), (test_x, _) = clusters(600, 16, 10, 0), clusters(300, 16, 10, 1)
    unit = torch.nn.functional.normalize
    theirs = benchmarking.knn_predict(unit(test_x), unit(train_x).T, train_y, 10, knn_k=k, knn_t=temperature)
    ours = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=10)
    assert torch.equal(ours[:, 0], theirs[:, 0])


# ---- logistic regression ------------------------------------------------------------------------------------------


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
def test_logistic_regression_agrees_with_scikit_learn(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, y = features(500, 0)
    ours = LogisticProblem(x, y, num_classes=5).fit(l2, tolerance=1e-9)
    standard = ((x - ours.mean) / ours.scale).numpy()
    theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000, solver="newton-cg")
    theirs.fit(standard, y.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-5 * np.abs(theirs.coef_).max() + 1e-9)
    test_x, _ = features(200, 1)
    expected = theirs.decision_function((test_x.numpy() - ours.mean.numpy()) / ours.scale.numpy())
    found = ours.logits(test_x).numpy()
    # Logits are the same up to a constant for each sample.
    found, expected = (a - a.mean(axis=1, keepdims=True) for a in (found, expected))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_minimum_is_stationary_and_the_same_from_anywhere() -> None:
    (x, y), (other_x, other_y) = features(300, 0), features(200, 1)
    elsewhere = LogisticProblem(other_x, other_y, num_classes=5).fit(1e-3)
    problem = LogisticProblem(x, y, num_classes=5)
    found = problem.fit(0.02, tolerance=1e-10)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    logits = ((x - found.mean) / found.scale) @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, y) + 0.01 * weight.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-7
    again = problem.fit(0.02, start=elsewhere, tolerance=1e-10)
    torch.testing.assert_close(again.weight, found.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.logits(x), logits.detach())
    single = LogisticProblem(x.float(), y, num_classes=5).fit(0.02)
    assert single.converged
    assert (single.logits(x.float()).argmax(1) == found.logits(x).argmax(1)).double().mean() > 0.99


def test_a_start_of_other_features_is_the_same_classifier() -> None:
    (x, y), (other_x, other_y) = features(300, 0), features(200, 1)
    model = LogisticProblem(x, y, num_classes=5).fit(0.02)
    unmoved = LogisticProblem(other_x, other_y, num_classes=5).fit(0.02, start=model, max_iterations=0)
    torch.testing.assert_close(unmoved.logits(x), model.logits(x))


def test_pieces_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(100, 0)
    whole = LogisticProblem(x, y, num_classes=5).fit(0.1, tolerance=1e-10)
    monkeypatch.setattr("byol_fast.evaluate.linear._ROWS", 7)
    pieces = LogisticProblem(x, y, num_classes=5).fit(0.1, tolerance=1e-10)
    torch.testing.assert_close(pieces.weight, whole.weight, atol=1e-7, rtol=0)


def test_the_sweep_takes_what_is_best_on_images_it_held_out_in_all_views() -> None:
    """Noise features: a weak l2 learns them by heart. Were a held-out image's mirror learned from, weak would win."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 300, generator=generator) + 0.4 * torch.nn.functional.one_hot(y, 300)
    mirrored = x + 1e-3 * torch.randn(120, 300, generator=generator)
    sweep = sweep_logistic([x, mirrored], y, num_classes=3, l2=(1e-5, 3.0, 30.0), held_out=0.3, seed=0)
    best = max(right for _, right in sweep.candidates)
    assert sweep.model.l2 == max(l2 for l2, right in sweep.candidates if right == best)
    assert best < 0.9
    assert sweep.num_held_out == 36
    expected = LogisticProblem(torch.cat([x, mirrored]), y.repeat(2), num_classes=3).fit(sweep.model.l2)
    torch.testing.assert_close(sweep.model.logits(x), expected.logits(x), atol=2e-3, rtol=0)


def test_one_candidate_needs_nothing_held_out() -> None:
    x, y = features(60, 0)
    sweep = sweep_logistic([x], y, num_classes=5, l2=(0.1,), held_out=0.2, seed=0)
    assert (sweep.num_held_out, sweep.candidates) == (0, ())
    torch.testing.assert_close(sweep.model.weight, LogisticProblem(x, y, num_classes=5).fit(0.1).weight)


def test_heads_learn_as_if_each_were_alone() -> None:
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3

    def trained(lr: tuple[float, ...]) -> list[Tensor]:
        heads = Heads(6, 3, lr, torch.Generator().manual_seed(1))
        optimizer = heads.optimizer()
        for step in range(5):
            heads.set_rates(optimizer, step, 5, 64)
            optimizer.zero_grad()
            torch.stack([torch.nn.functional.cross_entropy(logits, y) for logits in heads(x)]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return [p.detach() for layer in heads.layers for p in layer.parameters()]

    together = trained((0.4, 0.05))
    for both, alone in zip(together, [*trained((0.4,)), *trained((0.05,))], strict=True):
        assert torch.equal(both, alone)
    # By hand, from the same first weights: Nesterov momentum 0.9, cosine to 0, the rate scaled by 64 / 256.
    reference = torch.nn.Linear(6, 3)
    begin = Heads(6, 3, (0.4,), torch.Generator().manual_seed(1)).layers[0]
    reference.load_state_dict(begin.state_dict())
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(5):
        rate = 0.4 * 64 / 256 * 0.5 * (1 + math.cos(math.pi * step / 5))
        gradients = torch.autograd.grad(
            torch.nn.functional.cross_entropy(reference(x), y), list(reference.parameters())
        )
        with torch.no_grad():
            for p, v, g in zip(reference.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(rate * (g + 0.9 * v))
    for found, expected in zip(together[:2], reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach())
