"""Evaluation by k nearest neighbors on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from byol_fast.config import ConfigError
from byol_fast.config.evaluation import KNNSettings
from byol_fast.config.fields import Temperature, check
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.metrics import Scores, accuracy, score
from byol_fast.evaluate.results import Baseline, Evaluation, ShotScores
from byol_fast.evaluate.runner import ClassifierRun, Entry, OnResult
from byol_fast.evaluate.splits import Index, draw_shots
from byol_fast.utils.intervals import mean_interval
from byol_fast.utils.precision import fp32_matmul
from byol_fast.utils.progress import Progress

CURVE_KS = (1, 5, 20, 100, 200)
"""Numbers of neighbors of the curve."""
NUM_DRAWS = 20
"""Random draws of the training images, for each number of shots."""
T95 = 2.0930240544082634
"""The 97.5 % point of Student's t distribution with 19 degrees of freedom, one less than the draws."""


def evaluate_knn(
    encoder: str | Path | PretrainedEncoder,
    train: object = None,
    test: object = None,
    *,
    settings: KNNSettings | None = None,
    output_dir: Path | None = None,
    progress: Progress | None = None,
    on_result: OnResult | None = None,
    **changes: Any,
) -> Evaluation:
    """Evaluate an encoder by its cosine nearest neighbors, which vote with exp(similarity / temperature).

    `shots=(1, 5)`: also the accuracy with 1 and with 5 training images of each class, over 20 random draws of them.

    Args:
        encoder: a run folder, an exported encoder, or a `PretrainedEncoder`.
        train: labeled images, anything that `byol_fast.data.open_source` takes; a folder with `train` and `val` (or
            `test`) inside serves as both. None: the images of the run.
        test: labeled images of classes that the training images have. None: the test images that belong to `train`.
        settings: of the protocol; None: the defaults.
        output_dir: folder that the record `knn.json` is written to; None: none is written.
        progress: shows progress; None: nothing is shown.
        on_result: called with each result, after its record is written.
        **changes: fields of the settings to replace.

    Raises:
        ValueError: the images or settings do not fit.
        ConfigError: the folder cannot be written.

    Examples:
        >>> evaluate_knn("runs/first", "photos/train", "photos/val", k=(20,)).top1
    """
    run = ClassifierRun(
        encoder,
        train,
        test,
        settings or KNNSettings(),
        changes,
        output_dir=output_dir,
        progress=progress,
        on_result=on_result,
    )
    s, config = run.settings, run.pretrained.config
    images = run.images
    num_train = len(images.train)
    if s.k and max(s.k) > num_train:
        raise ConfigError(f"eval: k must be at most the number of training images, {num_train}, got {max(s.k)}")
    default_k = min(config.knn.k if config is not None else 20, num_train)
    ks = s.k or (default_k, *(k for k in CURVE_KS if k != default_k and k <= num_train))
    temperature = s.temperature or (config.knn.temperature if config is not None else 0.07)
    if s.shots:  # raises before the work
        check_shots(s.shots, np.asarray(images.train.labels), np.asarray(images.test.labels), images.classes)

    results = [(entry.name, *_scores(entry, run, ks, temperature)) for entry in run.entries(images.train)]
    (_, scores, _), *baselines = results
    k, scores_at_k = scores[0]
    return run.finish(
        "knn",
        scores_at_k,
        chosen={"k": k, "temperature": temperature},
        baselines=[Baseline.of(name, baseline_scores[0][1]) for name, baseline_scores, _ in baselines],
        curve=sorted({k: at_k.top1 for k, at_k in scores}.items()),
        curve_label="k, neighbors (test images)",
        shots=[shots for _, _, shots_of_entry in results for shots in shots_of_entry],
    )


def _scores(
    entry: Entry, run: ClassifierRun[KNNSettings], ks: Sequence[int], temperature: float
) -> tuple[list[tuple[int, Scores]], list[ShotScores]]:
    """Each k, cut to the number of training images that can be read, with the scores of its votes; scores by shots."""
    images, s, num_classes = run.images, run.settings, len(run.images.classes)
    train_x, train_y = entry.features(images.train, "training images")
    test_x, test_y = entry.features(images.test, "test images")
    ks = [min(k, len(train_x)) for k in ks]
    with run.progress.bar(None, f"{entry.name}: nearest neighbors"):
        rankings = knn_rankings(
            train_x, train_y, test_x, ks=ks, temperature=temperature, num_classes=num_classes, num_ranked=5
        )
    scores = [(k, score(ranking, test_y, images.classes)) for k, ranking in zip(ks, rankings, strict=True)]
    if not s.shots:
        return scores, []
    # Again, as images that cannot be read are missing here.
    check_shots(s.shots, train_y.cpu().numpy(), test_y.cpu().numpy(), images.classes)
    with run.progress.bar(NUM_DRAWS, f"{entry.name}: few shots") as bar:
        shots = few_shot_scores(
            entry.name,
            (train_x, train_y),
            (test_x, test_y),
            shots=s.shots,
            k=ks[0],
            temperature=temperature,
            num_classes=num_classes,
            seed=s.seed,
            on_draw=bar.update,
        )
    return scores, shots


def check_shots(shots: Sequence[int], train_y: Index, test_y: Index, classes: Sequence[str]) -> None:
    """Check that each class of the images has as many training images as shots.

    Args:
        shots: numbers of training images per class.
        train_y: classes of the training images `[M]`.
        test_y: classes of the test images `[N]`.
        classes: names of the classes.

    Raises:
        ConfigError: a class has fewer; the message names the smallest.
    """
    counts = np.bincount(train_y, minlength=len(classes))
    present = np.union1d(train_y, test_y)  # `max_train` may leave a class without training images
    smallest = int(present[counts[present].argmin()])
    if counts[smallest] < max(shots):
        raise ConfigError(
            f"eval: shots must be at most the number of training images of each class, got {max(shots)}, but class "
            f"{classes[smallest]} has {counts[smallest]}; give fewer shots, or use more images (max_train)"
        )


def few_shot_scores(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    shots: Sequence[int],
    k: int,
    temperature: float,
    num_classes: int,
    seed: int,
    on_draw: Callable[[int], None],
) -> list[ShotScores]:
    """Accuracy of the votes of min(k, shots) neighbors among random training images, for each number of shots.

    There are 20 draws, functions of the seed: each has the same number of images of every class, and those of fewer
    shots are among those of more. The interval is Student's, of the mean over the draws.

    Args:
        name: the encoder, or a baseline.
        train: features of the training images `[M, D]` and their classes, int64 `[M]`; see `check_shots`.
        test: features of the test images `[N, D]` and their classes, int64 `[N]`.
        shots: numbers of training images per class; results are in ascending order.
        k: largest number of neighbors.
        temperature: as for `knn_predict`.
        num_classes: as for `knn_predict`.
        seed: of the draws.
        on_draw: called with the number of finished draws.
    """
    (train_x, train_y), (test_x, test_y) = train, test
    labels = train_y.cpu().numpy()
    shots = sorted(set(shots))
    accuracies: list[list[float]] = [[] for _ in shots]
    for draw in range(NUM_DRAWS):
        drawn = torch.from_numpy(draw_shots(labels, shots[-1], draw=draw, seed=seed)).to(train_x.device)
        for n, accuracies_of_n in zip(shots, accuracies, strict=True):
            selected = drawn[:, :n].flatten()
            (ranking,) = knn_rankings(
                train_x[selected],
                train_y[selected],
                test_x,
                ks=(min(k, n),),
                temperature=temperature,
                num_classes=num_classes,
                num_ranked=1,
            )
            accuracies_of_n.append(accuracy(ranking[:, 0], test_y))
        on_draw(draw + 1)
    results = []
    for n, accuracies_of_n in zip(shots, accuracies, strict=True):
        mean, interval = mean_interval(accuracies_of_n, T95)
        results.append(ShotScores(name, n, min(k, n), mean, interval, min(accuracies_of_n), max(accuracies_of_n)))
    return results


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int = 1024,
) -> Tensor:
    """Rank the classes of each test sample by the votes of its k nearest training samples.

    Cosine similarity; a neighbor votes with `exp(similarity / temperature)` (Wu et al., arXiv 1805.01978).

    Args:
        train_x: features `[M, D]`, floating point, normalized or not.
        train_y: classes `[M]`, integers in 0..num_classes-1.
        test_x: features `[N, D]`.
        k: number of neighbors, 1..M.
        temperature: positive.
        num_classes: number of classes.
        chunk: test samples compared at a time; bounds memory to `chunk * M` similarities.

    Returns:
        Class numbers, int64 `[N, num_classes]`, most votes first; classes with equal votes in ascending order.

    Raises:
        ValueError: shapes do not match, k or labels out of range, or temperature not positive.
    """
    return knn_rankings(
        train_x, train_y, test_x, ks=(k,), temperature=temperature, num_classes=num_classes, chunk=chunk
    )[0]


@torch.no_grad()
@fp32_matmul()
def knn_rankings(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    num_ranked: int | None = None,
    chunk: int = 1024,
) -> list[Tensor]:
    """`knn_predict` for several k, in one search.

    Args:
        train_x: as for `knn_predict`.
        train_y: as for `knn_predict`.
        test_x: as for `knn_predict`.
        ks: numbers of neighbors, each 1..M.
        temperature: as for `knn_predict`.
        num_classes: as for `knn_predict`.
        num_ranked: number of classes to rank, the best ones, in memory that does not grow with the number of classes;
            None: all.
        chunk: as for `knn_predict`.

    Returns:
        A ranking for each k, `[N, num_ranked]`, or `[N, num_classes]` if there are fewer.

    Raises:
        ValueError: as `knn_predict`.
    """
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            "knn_predict: train_x and test_x must be [M, D] and [N, D], "
            f"got {list(train_x.shape)} and {list(test_x.shape)}"
        )
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(f"knn_predict: train_y must be [{len(train_x)}], one per feature, got {list(train_y.shape)}")
    for k in ks:
        if not 1 <= k <= len(train_x):
            raise ValueError(f"knn_predict: k must be 1..{len(train_x)} (training samples), got {k}")
    check("knn_predict: temperature", Temperature, temperature)
    if int(train_y.min()) < 0 or int(train_y.max()) >= num_classes:
        raise ValueError(
            f"knn_predict: train_y must be 0..{num_classes - 1}, got {int(train_y.min())}..{int(train_y.max())}"
        )
    train_y, num_ranked = train_y.long(), min(num_ranked or num_classes, num_classes)
    bank = _normalize(train_x)
    rankings: list[list[Tensor]] = [[] for _ in ks]
    for queries in torch.split(test_x, chunk):
        similarity, nearest = (_normalize(queries) @ bank.T).topk(max(ks), dim=1)
        # exp(s / T) overflows fp32 for T < 0.0113; scaling a row so that its largest vote is 1 keeps the ranking.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = train_y[nearest]
        for k, rankings_of_k in zip(ks, rankings, strict=True):
            rankings_of_k.append(_rank_classes(classes[:, :k], votes[:, :k], num_ranked))
    empty = torch.empty(0, num_ranked, dtype=torch.int64, device=test_x.device)
    return [torch.cat([empty, *rankings_of_k]) for rankings_of_k in rankings]


def _rank_classes(classes: Tensor, votes: Tensor, num_ranked: int) -> Tensor:
    """The R classes with the most votes, best first; those with equal votes in ascending order.

    Args:
        classes: of the neighbors `[N, k]`.
        votes: of the neighbors `[N, k]`, zero or more.
        num_ranked: R.
    """
    # Of the classes without votes, only 0..R-1 can be among the first R: each gets a vote of 0.
    others = torch.arange(num_ranked, device=classes.device).expand(len(classes), -1)
    classes, votes = torch.cat([classes, others], dim=1), F.pad(votes, (0, num_ranked))
    # --- number the different classes of each row, in ascending order
    ascending, order = classes.sort(dim=1)
    numbers = F.pad((ascending[:, 1:] != ascending[:, :-1]).cumsum(dim=1), (1, 0))
    class_of = torch.zeros_like(numbers).scatter_(1, numbers, ascending)
    # --- sum the votes of each class in the order of the neighbors, and sort
    number_of_neighbor = torch.empty_like(numbers).scatter_(1, order, numbers)
    sums = torch.zeros_like(votes).scatter_add_(1, number_of_neighbor, votes)
    sums.masked_fill_(torch.arange(sums.shape[1], device=sums.device) > numbers[:, -1:], -1)  # no class
    best = sums.argsort(dim=1, descending=True, stable=True)[:, :num_ranked]
    return class_of.gather(1, best)


def _normalize(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


@dataclass(frozen=True, slots=True)
class KNNResult:
    """Accuracy of a kNN classifier."""

    top1: float
    """Share of test samples whose first-ranked class is correct, 0..1."""
    top5: float
    """Share of test samples whose class is among the first five."""
    num_train: int
    num_test: int
    k: int
    """Number of neighbors that voted."""


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int, temperature: float, num_classes: int
) -> KNNResult:
    """Accuracy of `knn_predict`; k is limited to the number of training samples."""
    k = min(k, len(train_x))
    (ranking,) = knn_rankings(
        train_x, train_y, test_x, ks=(k,), temperature=temperature, num_classes=num_classes, num_ranked=5
    )
    hits = ranking == test_y.to(ranking.device)[:, None]
    return KNNResult(
        top1=float(hits[:, 0].float().mean()),
        top5=float(hits.any(dim=1).float().mean()),
        num_train=len(train_x),
        num_test=len(test_x),
        k=k,
    )
