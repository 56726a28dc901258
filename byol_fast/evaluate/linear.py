"""Evaluation by a linear classifier on frozen features: logistic regression, or SGD on augmented images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_fast.config.evaluation import LinearSettings
from byol_fast.data import ImageSource
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.logistic import COPIES_IN_FIT, sweep_logistic
from byol_fast.evaluate.metrics import Scores, accuracy, classify, score, top_classes
from byol_fast.evaluate.results import Baseline, Evaluation
from byol_fast.evaluate.runner import ClassifierRun, Entry, OnResult
from byol_fast.evaluate.splits import train_val_split
from byol_fast.evaluate.supervised_loader import SupervisedLoader, generator
from byol_fast.models.encoders import feature_dim
from byol_fast.optim.schedules import lr_at
from byol_fast.utils.precision import fp32_matmul
from byol_fast.utils.progress import Progress

Curve = list[tuple[float, float]]


def evaluate_linear(
    encoder: str | Path | PretrainedEncoder,
    train: object = None,
    test: object = None,
    *,
    settings: LinearSettings | None = None,
    output_dir: Path | None = None,
    progress: Progress | None = None,
    on_result: OnResult | None = None,
    **changes: Any,
) -> Evaluation:
    """Evaluate an encoder by a linear classifier on its frozen features.

    `protocol="fast"`: one pass over center crops; multinomial logistic regression by L-BFGS, its regularization
    selected on held-out training images, then fitted on all training images (BYOL, arXiv 2006.07733, appendix on
    transfer; here, features are standardized). `protocol="reference"`: SGD with Nesterov momentum on random crops and
    flips, BN in eval mode, cosine decay, 80 epochs; the learning rate is selected on held-out training images, without
    training again (the paper's appendix on linear evaluation).

    Args:
        encoder: as for `evaluate_knn`.
        train: as for `evaluate_knn`.
        test: as for `evaluate_knn`.
        settings: as for `evaluate_knn`.
        output_dir: folder that the record is written to, `linear.json` or `linear_reference.json`; None: none.
        progress: as for `evaluate_knn`.
        on_result: as for `evaluate_knn`.
        **changes: fields of the settings to replace.

    Raises:
        ValueError: the images or settings do not fit.
        ConfigError: the folder cannot be written.

    Examples:
        >>> evaluate_linear("runs/first", baselines=True).to_dict()["baselines"]
    """
    run = ClassifierRun(
        encoder,
        train,
        test,
        settings or LinearSettings(),
        changes,
        output_dir=output_dir,
        progress=progress,
        on_result=on_result,
    )
    return _evaluate_logistic(run) if run.settings.protocol == "fast" else _evaluate_sgd(run)


def _evaluate_logistic(run: ClassifierRun[LinearSettings]) -> Evaluation:
    s, images = run.settings, run.images
    num_classes = len(images.classes)
    if len(set(s.l2)) > 1:  # raises before the work
        train_val_split(np.asarray(images.train.labels), s.held_out, seed=s.seed)
    dim = feature_dim(run.pretrained.encoder, run.pretrained.preprocessing.crop)
    run.context.check_memory(COPIES_IN_FIT * num_classes * (dim + 1), num_classes)

    def evaluate(entry: Entry) -> tuple[Scores, dict[str, Any], Curve, int]:
        x, y = entry.features(images.train, "training images")
        views = [x]
        if s.flip:
            views.append(entry.features(images.train, "mirrored training images", flip=True)[0])
        with run.progress.bar(len(set(s.l2)), f"{entry.name}: logistic regression") as bar:
            sweep = sweep_logistic(
                views,
                y,
                num_classes=num_classes,
                l2=s.l2,
                held_out=s.held_out,
                seed=s.seed,
                on_fit=bar.update,
            )
        del x, views  # room for the features of the test images
        test_x, test_y = entry.features(images.test, "test images")
        ranking = classify(sweep.model.logits, test_x, num_classes, top_classes)
        scores = score(ranking, test_y, images.classes)
        facts = {
            "l2": sweep.model.l2,
            "iterations": sweep.model.iterations,
            "converged": sweep.model.converged,
            "num_held_out": sweep.num_held_out,
        }
        return scores, facts, list(sweep.candidates), len(y)

    (_, (scores, facts, curve, num_train)), *baselines = [
        (entry.name, evaluate(entry)) for entry in run.entries(images.train)
    ]
    return run.finish(
        "linear",
        scores,
        chosen=facts | {"l2_of_baselines": {name: other["l2"] for name, (_, other, _, _) in baselines}},
        baselines=[Baseline.of(name, baseline_scores) for name, (baseline_scores, *_) in baselines],
        curve=curve,
        curve_label="l2 (held-out training images)",
        num_train=num_train,
    )


def _evaluate_sgd(run: ClassifierRun[LinearSettings]) -> Evaluation:
    s, images = run.settings, run.images
    train, val, num_classes = images.train, None, len(images.classes)
    if len(set(s.lr)) > 1:
        parts = train_val_split(np.asarray(train.labels), s.held_out, seed=s.seed)
        train, val = (images.train.subset(part) for part in parts)

    def evaluate(entry: Entry) -> tuple[Scores, float, Curve]:
        classifiers = _train_classifiers(entry, train, s)
        curve: Curve = []
        best = 0
        if val is not None:
            x, y = entry.features(val, "held-out images")
            accuracies = [accuracy(classify(layer, x, num_classes), y) for layer in classifiers.layers]
            curve = sorted(zip(classifiers.lr, accuracies, strict=True))
            best = int(np.argmax(accuracies))
        test_x, test_y = entry.features(images.test, "test images")
        ranking = classify(classifiers.layers[best], test_x, num_classes, top_classes)
        return score(ranking, test_y, images.classes), classifiers.lr[best], curve

    with torch.no_grad():
        results = [(entry.name, evaluate(entry)) for entry in run.entries(images.train, raw_pixels=False)]
    (_, (scores, lr, curve)), *baselines = results
    return run.finish(
        "linear_reference",
        scores,
        chosen={
            "lr": lr,
            "epochs": s.epochs,
            "batch_size": min(s.batch_size, len(train)),
            "num_held_out": 0 if val is None else len(val),
            "lr_of_baselines": {name: other for name, (_, other, _) in baselines},
        },
        baselines=[Baseline.of(name, baseline_scores) for name, (baseline_scores, *_) in baselines],
        curve=curve,
        curve_label="learning rate (held-out training images)",
        num_train=len(train),
    )


def _train_classifiers(entry: Entry, source: ImageSource, s: LinearSettings) -> LinearClassifiers:
    """One linear classifier per learning rate, all trained in one pass over random crops."""
    context, pretrained = entry.run.context, entry.run.pretrained
    encoder = entry.network.eval()
    dim, num_classes = feature_dim(encoder, pretrained.preprocessing.crop), len(source.classes)
    # Weights, gradients and momentum; the logits of a batch, and their gradients.
    values = 3 * dim * num_classes + 2 * min(s.batch_size, len(source)) * num_classes
    context.check_memory(len(set(s.lr)) * values, num_classes)
    classifiers = LinearClassifiers(dim, num_classes, sorted(set(s.lr)), generator(s.seed)).to(context.device)
    normalize = pretrained.normalize.to(context.device)
    loader = SupervisedLoader(pretrained, source, context, batch_size=s.batch_size, seed=s.seed)
    total_steps = s.epochs * loader.batches_per_epoch
    optimizer = classifiers.optimizer()
    with context.progress.bar(total_steps, f"{entry.name}: linear classifiers") as bar:
        for step, (images, y) in enumerate(loader.batches(total_steps)):
            with context.autocast():
                x = encoder(normalize(images)).flatten(1).float()
            classifiers.set_lr(optimizer, step, total_steps, loader.batch_size)
            optimizer.zero_grad()
            with torch.enable_grad(), fp32_matmul():
                # The classifiers share no weights: the gradient of the sum is that of each classifier's own loss.
                losses = [F.cross_entropy(logits, y) for logits in classifiers(x)]
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update(step + 1, f"epoch {step // loader.batches_per_epoch + 1}/{s.epochs}")
    return classifiers


class LinearClassifiers(nn.Module):
    """Linear classifiers on the same features, each with its own learning rate.

    Args:
        dim: size of the features.
        num_classes: outputs of each classifier.
        lr: peak learning rate of each, for a batch of 256.
        generator: for the initial weights, which are the same for all (`truncated_normal`); biases are 0.
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
        """Logits `[B, C]` of each classifier for features `[B, D]`."""
        return [layer(x) for layer in self.layers]

    def optimizer(self) -> torch.optim.SGD:
        """SGD with one parameter group per classifier; `set_lr` sets their learning rates."""
        return nesterov_sgd([{"params": list(layer.parameters())} for layer in self.layers])

    def set_lr(self, optimizer: torch.optim.SGD, step: int, total_steps: int, batch_size: int) -> None:
        """Cosine decay to 0 without warm-up; the peak scales with the batch size."""
        for group, lr in zip(optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr_at(step, total_steps, 0, lr, batch_size)


def truncated_normal(num_classes: int, dim: int, generator: torch.Generator) -> Tensor:
    """Initial weights `[C, D]`: normal with std 1 / sqrt(D), truncated at two std, as haiku's Linear."""
    std = 1 / math.sqrt(dim)
    return nn.init.trunc_normal_(torch.empty(num_classes, dim), std=std, a=-2 * std, b=2 * std, generator=generator)


def nesterov_sgd(parameters: object) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9 and no weight decay, as in the reference's evaluations."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True)  # type: ignore[arg-type]
