"""An encoder judged by nearest neighbours, a linear classifier or fine-tuning: what `byol-fast eval` does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast import config as configs
from byol_fast.config import ConfigError
from byol_fast.config.evaluation import EvalSettings, FinetuneSettings, KNNSettings, LinearSettings
from byol_fast.data import ImageSource
from byol_fast.evaluate.encoder import (
    Images,
    Subject,
    Workplace,
    load_subject,
    open_images,
    raw_pixel_size,
    settings_dict,
    untrained_network,
)
from byol_fast.evaluate.finetune import batch_size_for, choose, finetune
from byol_fast.evaluate.knn import knn_rankings
from byol_fast.evaluate.linear import Heads, sweep_logistic
from byol_fast.evaluate.metrics import Scores, accuracy, ranked, score
from byol_fast.evaluate.results import Baseline, Evaluation, check_writable, write
from byol_fast.evaluate.splits import balanced_subset, hold_out
from byol_fast.evaluate.supervised_loader import Crops, generator
from byol_fast.models.encoders import feature_dim
from byol_fast.utils import env
from byol_fast.utils.progress import Progress

S = TypeVar("S", bound=EvalSettings)
CURVE_OF_K = (1, 5, 20, 100, 200)


def evaluate_knn(
    encoder: str | Path | Subject,
    train: object = None,
    test: object = None,
    *,
    settings: KNNSettings | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Evaluation:
    """Judge an encoder by cosine nearest neighbours that vote with exp(similarity / temperature).

    Args:
        encoder: a run folder, an exported encoder, or a `Subject`.
        train: labelled images, anything `byol_fast.data.open_source` takes; a folder with `train` and `val` (or `test`)
            inside serves both. None: the run's own.
        test: labelled images of classes that the training images have. None: what belongs to `train`.
        settings: the protocol; the defaults when None.
        to: folder that the record and its pictures are written to; None: nothing is written.
        progress: shows how far it is; None: nothing is shown.
        **changes: fields of the settings.

    Raises:
        ValueError: images or settings that do not fit; says which and how.

    Example:
        >>> evaluate_knn("runs/first", "photos/train", "photos/val", k=(20,)).top1
    """
    job = _Job(encoder, train, test, _settings(KNNSettings, settings, changes), to, progress)
    s, run = job.settings, job.subject.run
    count = len(job.images.train)
    if s.k and max(s.k) > count:
        raise ConfigError(f"eval: k must be at most the number of training images, {count}, got {max(s.k)}")
    own = min(run.knn.k if run is not None else 20, count)
    ks = s.k or (own, *(k for k in CURVE_OF_K if k != own and k <= count))
    temperature = s.temperature or (run.knn.temperature if run is not None else 0.07)

    def scores_of(contender: _Contender) -> list[Scores]:
        train_x, train_y = contender.features(job.images.train, "training images")
        test_x, test_y = contender.features(job.images.test, "test images")
        fitting = [min(k, len(train_x)) for k in ks]
        rankings = knn_rankings(
            train_x, train_y, test_x, ks=fitting, temperature=temperature, num_classes=len(job.images.classes)
        )
        return [score(ranking, test_y, job.images.classes) for ranking in rankings]

    found = [(contender.name, scores_of(contender)) for contender in job.contenders()]
    (_, own_scores), *others = found
    return job.finish(
        "knn",
        own_scores[0],
        chosen={"k": ks[0], "temperature": temperature},
        baselines=[_baseline(name, scores[0]) for name, scores in others],
        curve=sorted(zip(ks, [scores.top1 for scores in own_scores], strict=True)),
        curve_label="k, neighbours (test images)",
    )


def evaluate_linear(
    encoder: str | Path | Subject,
    train: object = None,
    test: object = None,
    *,
    settings: LinearSettings | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Evaluation:
    """Judge an encoder by a linear classifier on its frozen features.

    `protocol="fast"`: each image passes the encoder once, as a centre crop; multinomial logistic regression by L-BFGS,
    its regularisation chosen on held-out training images, then refitted on all of them (BYOL, arXiv 2006.07733,
    appendix on transfer; ours standardises the features). `protocol="reference"`: SGD with Nesterov momentum on random
    crops and flips, batch norms frozen, cosine decay, 80 epochs; of the learning rates the best on held-out training
    images counts, as it is (the paper's appendix on linear evaluation).

    Args:
        encoder: as for `evaluate_knn`.
        train: as for `evaluate_knn`.
        test: as for `evaluate_knn`.
        settings: as for `evaluate_knn`.
        to: as for `evaluate_knn`.
        progress: as for `evaluate_knn`.
        **changes: fields of the settings.

    Raises:
        ValueError: images or settings that do not fit; says which and how.

    Example:
        >>> evaluate_linear("runs/first", baselines=True).to_dict()["baselines"]
    """
    job = _Job(encoder, train, test, _settings(LinearSettings, settings, changes), to, progress)
    return _linear_fast(job) if job.settings.protocol == "fast" else _linear_reference(job)


def evaluate_finetune(
    encoder: str | Path | Subject,
    train: object = None,
    test: object = None,
    *,
    settings: FinetuneSettings | None = None,
    to: Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> list[Evaluation]:
    """Judge an encoder by what the whole network learns from few labels: 1 %, 10 % and all of them by default.

    SGD with Nesterov momentum, cosine decay, random crops and flips; the network of the last epoch counts. Where there
    are several candidates (`lr`, `epochs`), each is trained without a held-out part of the labelled images and judged
    by it, and the best is trained again on all of them (BYOL, arXiv 2006.07733, appendix on semi-supervised training).

    Args:
        encoder: as for `evaluate_knn`.
        train: as for `evaluate_knn`.
        test: as for `evaluate_knn`.
        settings: as for `evaluate_knn`.
        to: as for `evaluate_knn`; written after each share of the labels.
        progress: as for `evaluate_knn`.
        **changes: fields of the settings.

    Returns:
        An evaluation for each share of the labels.

    Raises:
        ValueError: images or settings that do not fit; says which and how.
    """
    job = _Job(encoder, train, test, _settings(FinetuneSettings, settings, changes), to, progress)
    return [_finetune_on(job, share) for share in job.settings.labels]


# ---- what they share ----------------------------------------------------------------------------------------------


def _settings(kind: type[S], settings: S | None, changes: dict[str, Any]) -> S:
    return configs.replace(settings or kind(), changes)


def _baseline(name: str, scores: Scores) -> Baseline:
    return Baseline(name, scores.top1, scores.top1_ci95, scores.top5)


@dataclass(frozen=True, eq=False, slots=True)
class _Contender:
    """A network, or raw pixels, in the place of the encoder."""

    name: str
    encoder: nn.Module
    job: _Job[Any]
    size: int | None = None

    def features(self, source: ImageSource, what: str, *, flip: bool = False) -> tuple[Tensor, Tensor]:
        what = f"{self.name}: {what}"
        return self.job.workplace.features(self.job.subject, self.encoder, source, what, size=self.size, flip=flip)


class _Job(Generic[S]):
    """An evaluation under way: what, on which images, how, and where the record goes."""

    def __init__(
        self,
        encoder: str | Path | Subject,
        train: object,
        test: object,
        settings: S,
        to: Path | None,
        progress: Progress | None,
    ) -> None:
        self.began = time.monotonic()
        self.settings, self.to = settings, to
        if to is not None:
            check_writable(to)  # now, and not when the work is done
        self.progress = progress or Progress()
        self.workplace = Workplace(settings, self.progress)
        self.subject = encoder if isinstance(encoder, Subject) else load_subject(encoder)
        self.images: Images = open_images(self.subject, train, test, settings)
        self.progress.say(f"{self.subject.name}, on {self.workplace.device} in {self.workplace.precision.name}")
        self.progress.say(f"training images: {self.images.train.describe()}")
        self.progress.say(f"test images: {self.images.test.describe()}")

    def contenders(self, *, pixels: bool = True) -> Iterator[_Contender]:
        """The encoder; then, where baselines are wanted, the untrained one and raw pixels. Made when they are due."""
        yield _Contender("this encoder", self.workplace.placed(self.subject.encoder), self)
        if not self.settings.baselines:
            return
        network = self.workplace.untrained(self.subject, self.images.train, self.settings.seed)
        yield _Contender("untrained, calibrated", network, self)
        if pixels:
            size = raw_pixel_size(self.subject)
            yield _Contender(f"raw pixels ({size} px)", nn.Flatten(), self, size)

    def finish(
        self,
        protocol: str,
        scores: Scores,
        *,
        chosen: dict[str, Any],
        baselines: Sequence[Baseline],
        curve: Sequence[tuple[float, float]],
        curve_label: str,
        num_train: int | None = None,
        began: float | None = None,
    ) -> Evaluation:
        """Make the record, and write it where that is wanted."""
        evaluation = Evaluation(
            protocol=protocol,
            encoder=self.subject.name,
            step=self.subject.step,
            train=self.images.train.describe(),
            test=self.images.test.describe(),
            num_train=len(self.images.train) if num_train is None else num_train,
            num_test=int(scores.confusion.sum()),
            classes=self.images.classes,
            scores=scores,
            settings=settings_dict(self.settings),
            chosen=chosen,
            baselines=tuple(baselines),
            curve=tuple(curve),
            curve_label=curve_label,
            seconds=time.monotonic() - (self.began if began is None else began),
            date=time.strftime("%Y-%m-%d"),
            environment=env.describe(self.workplace.device)
            | {"precision": self.workplace.precision.name}
            | env.checkout(),
        )
        if self.to is not None:
            for path in write(evaluation, self.to):
                self.progress.say(str(path))
        return evaluation


# ---- linear -------------------------------------------------------------------------------------------------------


def _linear_fast(job: _Job[LinearSettings]) -> Evaluation:
    s, number = job.settings, len(job.images.classes)

    def outcome(contender: _Contender) -> tuple[Scores, dict[str, Any], tuple[tuple[float, float], ...], int]:
        x, y = contender.features(job.images.train, "training images")
        views = [x]
        if s.flip:
            views.append(contender.features(job.images.train, "mirrored training images", flip=True)[0])
        with job.progress.bar(len(set(s.l2)), f"{contender.name}: logistic regression") as bar:
            sweep = sweep_logistic(
                views, y, num_classes=number, l2=s.l2, held_out=s.held_out, seed=s.seed, tell=bar.update
            )
        del views
        test_x, test_y = contender.features(job.images.test, "test images")
        scores = score(ranked(sweep.model.logits(test_x)), test_y, job.images.classes)
        facts = {
            "l2": sweep.model.l2,
            "iterations": sweep.model.iterations,
            "converged": sweep.model.converged,
            "num_held_out": sweep.num_held_out,
        }
        return scores, facts, sweep.candidates, len(y)

    found = [(contender.name, outcome(contender)) for contender in job.contenders()]
    (_, (scores, facts, candidates, num_train)), *others = found
    return job.finish(
        "linear",
        scores,
        chosen=facts | {"l2_of_baselines": {name: facts["l2"] for name, (_, facts, _, _) in others}},
        baselines=[_baseline(name, scores) for name, (scores, _, _, _) in others],
        curve=candidates,
        curve_label="l2 (held-out training images)",
        num_train=num_train,
    )


def _linear_reference(job: _Job[LinearSettings]) -> Evaluation:
    s, train = job.settings, job.images.train
    fit, held = train, None
    if len(set(s.lr)) > 1:
        parts = hold_out(np.asarray(train.labels), s.held_out, seed=s.seed)
        fit, held = (train.subset(part) for part in parts)

    def outcome(contender: _Contender) -> tuple[Scores, float, list[tuple[float, float]], int]:
        heads = _train_heads(job, contender, fit)
        candidates: list[tuple[float, float]] = []
        best = 0
        if held is not None:
            x, y = contender.features(held, "held-out images")
            right = [accuracy(logits, y) for logits in heads(x)]
            candidates = sorted(zip(heads.lr, right, strict=True))
            best = int(np.argmax(right))
        test_x, test_y = contender.features(job.images.test, "test images")
        scores = score(ranked(heads(test_x)[best]), test_y, job.images.classes)
        return scores, heads.lr[best], candidates, min(s.batch_size, len(fit))

    with torch.no_grad():
        found = [(contender.name, outcome(contender)) for contender in job.contenders(pixels=False)]
    (_, (scores, lr, candidates, batch_size)), *others = found
    return job.finish(
        "linear_reference",
        scores,
        chosen={
            "lr": lr,
            "epochs": s.epochs,
            "batch_size": batch_size,
            "num_held_out": 0 if held is None else len(held),
            "lr_of_baselines": {name: rate for name, (_, rate, _, _) in others},
        },
        baselines=[_baseline(name, scores) for name, (scores, _, _, _) in others],
        curve=candidates,
        curve_label="learning rate (held-out training images)",
        num_train=len(fit),
    )


def _train_heads(job: _Job[LinearSettings], contender: _Contender, source: ImageSource) -> Heads:
    """A linear classifier for each learning rate, all in one pass over crops of the images."""
    s, workplace = job.settings, job.workplace
    encoder = contender.encoder.eval()
    dim = feature_dim(encoder, job.subject.image_size)
    heads = Heads(dim, len(job.images.classes), sorted(set(s.lr)), generator(s.seed)).to(workplace.device)
    normalize = job.subject.normalize.to(workplace.device)
    crops = Crops(job.subject, source, workplace, batch_size=s.batch_size, seed=s.seed)
    steps = s.epochs * crops.steps_per_epoch
    optimizer = heads.optimizer()
    with job.progress.bar(steps, f"{contender.name}: linear classifiers") as bar:
        for step, (images, y) in enumerate(crops.take(steps)):
            with workplace.autocast():
                x = encoder(normalize(images)).flatten(1).float()
            heads.set_rates(optimizer, step, steps, crops.batch_size)
            optimizer.zero_grad()
            with torch.enable_grad():
                # Each classifier has a loss of its own: the gradient of their sum is the gradient of each.
                torch.stack([F.cross_entropy(logits, y) for logits in heads(x)]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update(step + 1, f"epoch {step // crops.steps_per_epoch + 1}/{s.epochs}")
    return heads


# ---- fine-tuning --------------------------------------------------------------------------------------------------


def _finetune_on(job: _Job[FinetuneSettings], share: float) -> Evaluation:
    began = time.monotonic()
    s, train = job.settings, job.images.train
    labels = np.asarray(train.labels)
    labelled = train.subset(balanced_subset(labels, share, seed=s.seed))
    candidates = [(lr, epochs) for lr in sorted(set(s.lr)) for epochs in sorted(set(s.epochs))]
    batch_size = batch_size_for(len(labelled), s.batch_size)
    name = f"{100 * share:g}pct"

    def outcome(who: str, encoder: nn.Module) -> tuple[Scores, dict[str, Any], list[tuple[float, float]]]:
        what = f"{who}, {len(labelled)} labels"
        (lr, epochs), tried, held_count = candidates[0], [], 0
        if len(candidates) > 1:
            fit, held = (labelled.subset(p) for p in hold_out(np.asarray(labelled.labels), s.held_out, seed=s.seed))
            held_count = len(held)
            tried = choose(
                job.subject,
                encoder,
                fit,
                held,
                job.workplace,
                candidates=candidates,
                batch_size=batch_size,
                seed=s.seed,
                what=what,
            )
            lr, epochs, _ = max(tried, key=lambda candidate: candidate[2])
        tuned = finetune(
            job.subject,
            encoder,
            labelled,
            job.workplace,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            seed=s.seed,
            what=what,
        )
        logits, y = job.workplace.features(job.subject, tuned.network, job.images.test, f"{what}: test images")
        scores = score(ranked(logits), y, job.images.classes)
        facts: dict[str, Any] = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "num_held_out": held_count}
        facts["tried"] = [{"lr": a, "epochs": b, "top1_held_out": c} for a, b, c in tried]
        curve = [(float(epoch), right) for epoch, right in enumerate(tuned.history, 1)]
        return scores, facts, curve

    scores, facts, curve = outcome("this encoder", job.subject.encoder)
    baselines = []
    if s.baselines:
        scratch, its_facts, _ = outcome("from scratch", untrained_network(job.subject, s.seed))
        baselines.append(_baseline("from scratch", scratch))
        facts["from_scratch"] = its_facts
    return job.finish(
        f"finetune_{name}",
        scores,
        chosen={"labels": share} | facts,
        baselines=baselines,
        curve=curve,
        curve_label="epoch (training crops, while it learned)",
        num_train=len(labelled),
        began=began,
    )
