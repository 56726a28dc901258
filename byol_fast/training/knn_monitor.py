"""kNN evaluation of the online encoder during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from byol_fast.config import Config, ConfigError, Preprocessing
from byol_fast.data import ImageSource, eval_batches
from byol_fast.evaluate.extract import CALIBRATION_IMAGES, extract_features, recalibrate_bn
from byol_fast.evaluate.images import labels_of
from byol_fast.evaluate.knn import KNNResult, knn_accuracy
from byol_fast.evaluate.rankme import rankme, subsample_rows
from byol_fast.evaluate.splits import subsample, subsample_classes
from byol_fast.models.base import SSLModel
from byol_fast.training.online_probe import OnlineProbe
from byol_fast.utils import progress


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalMetrics:
    """Quality of an encoder at one step of a run."""

    knn: KNNResult
    """Nearest neighbors among the training images."""
    num_train: int
    """All training images, of which `knn.num_train` were compared with."""
    num_val: int
    """All validation images, of which `knn.num_test` were evaluated."""
    rankme: float
    """Effective rank of the training images' features; see `byol_fast.evaluate.rankme`."""
    probe_top1: float | None
    """Accuracy of the online probe on the validation images, 0..1; None without a trained probe."""
    is_full: bool
    """Evaluated on all images after the last step (`knn.full_at_end`)."""

    def summary(self) -> str:
        """One line for the terminal."""
        probe = "" if self.probe_top1 is None else f", linear probe {self.probe_top1:.1%}"
        train, val = _part(self.knn.num_train, self.num_train), _part(self.knn.num_test, self.num_val)
        return (
            f"kNN-{self.knn.k} top-1 {self.knn.top1:.1%}{probe} on {val} validation images; RankMe {self.rankme:.0f}; "
            f"compared with {train} training images"
        )

    def to_dict(self) -> dict[str, float | None]:
        """Values for the metrics file; those on all images after the last step have names of their own."""
        sizes = {"knn_k": self.knn.k, "knn_num_train": self.knn.num_train, "knn_num_val": self.knn.num_test}
        if self.is_full:
            return {"knn_full_top1": self.knn.top1, "knn_full_top5": self.knn.top5, **sizes}
        values = {
            "knn_top1": self.knn.top1,
            "knn_top5": self.knn.top5,
            **sizes,
            "rankme": self.rankme if math.isfinite(self.rankme) else None,
        }
        return values if self.probe_top1 is None else values | {"probe_val_top1": self.probe_top1}


def _part(count: int, total: int) -> str:
    return f"{count:,}" if count == total else f"{count:,} of {total:,}"


@dataclass(frozen=True, slots=True, eq=False)
class EvalFeatures:
    """Features of an evaluation, for further ones of the same encoder."""

    train_x: Tensor
    """Features of the training images `[M, D]`."""
    train_y: Tensor
    """Their classes `[M]`."""
    knn: KNNResult
    """Accuracy on the validation images."""
    extract: Callable[..., tuple[Tensor, Tensor]]
    """`extract_features` of the encoder: takes batches of other images."""


class KNNMonitor:
    """Evaluates the encoder of a run: kNN accuracy, RankMe, and the online probe's accuracy.

    Args:
        config: `knn`, `view1` and `data` are used.
        model: the model with the encoder.
        train: labeled training images.
        val: labeled validation images.
        device: device of the model.
        autocast: dtype to compute in; None: that of the weights.
        probe: the linear classifier that is trained beside the encoder.
    """

    def __init__(
        self,
        config: Config,
        model: SSLModel,
        train: ImageSource,
        val: ImageSource,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        probe: OnlineProbe | None = None,
    ) -> None:
        self.config, self.model, self.train, self.val = config, model, train, val
        self.device, self.autocast, self.probe = device, autocast, probe
        self.on_features: Callable[[EvalFeatures], None] | None = None
        """Called at the end of each evaluation."""

    @property
    def is_partial(self) -> bool:
        """True if the evaluations during the run leave images out."""
        knn = self.config.knn
        return 0 < knn.max_train < len(self.train) or 0 < knn.max_val < len(self.val)

    def __call__(self, *, untrained: bool, check: Callable[[], None], full: bool = False) -> EvalMetrics:
        """Evaluate the encoder at its current weights.

        Args:
            untrained: calibrate a copy's BN statistics first; those of an untrained network are 0 and 1.
            check: called before every batch; may raise to stop.
            full: evaluate on all images, whatever the configuration's limits.
        """
        knn, encoder = self.config.knn, self.model.encoder
        options: dict[str, Any] = {
            "normalize": self.model.normalize,
            "device": self.device,
            "autocast": self.autocast,
            "check": check,
        }
        train = subsample_classes(self.train, 0 if full else knn.max_train)
        val = subsample_classes(self.val, 0 if full else knn.max_val)
        which = f"{self.config.before_training} encoder" if untrained else "all images" if full else "evaluation"
        if untrained:
            calibration = self.batches(subsample(train, CALIBRATION_IMAGES), f"{which}, calibrating norms")
            encoder = recalibrate_bn(encoder, calibration, **options)
        train_x, train_index = extract_features(encoder, self.batches(train, f"{which}, training"), **options)
        val_x, val_index = extract_features(encoder, self.batches(val, f"{which}, validation"), **options)
        train_y, val_y = labels_of(train)[train_index].to(self.device), labels_of(val)[val_index]
        accuracy = self.accuracy(train_x, train_y, val_x, val_y)
        if self.on_features is not None and not full:
            extract = partial(extract_features, encoder, **options)
            self.on_features(EvalFeatures(train_x, train_y, accuracy, extract))
        is_probe_trained = self.probe is not None and bool(self.probe.steps > 0)
        return EvalMetrics(
            knn=accuracy,
            num_train=len(self.train),
            num_val=len(self.val),
            rankme=rankme(subsample_rows(train_x)),
            probe_top1=self.probe.top1(val_x, val_y) if self.probe is not None and is_probe_trained else None,
            is_full=full,
        )

    def accuracy(self, train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor) -> KNNResult:
        """Accuracy of the run's classifier.

        Args:
            train_x: features `[M, D]`.
            train_y: classes `[M]`, on the device.
            val_x: features `[N, D]`.
            val_y: classes `[N]`.
        """
        knn = self.config.knn
        return knn_accuracy(
            train_x, train_y, val_x, val_y, k=knn.k, temperature=knn.temperature, num_classes=len(self.train.classes)
        )

    def batches(self, source: ImageSource, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as the exported encoder takes them, but not normalized, and their positions; shows their number."""
        data = self.config.data
        batches = eval_batches(
            source,
            Preprocessing.of_config(self.config),
            256,
            threads=data.threads,
            loader=data.loader,
            device=self.device,
            on_corrupt=data.on_corrupt,
        )
        return progress.current().track(batches, len(source), description)


def knn_problem(config: Config, train: ImageSource, val: ImageSource | None) -> str | None:
    """Reason why kNN evaluation is not possible; None if it is.

    Raises:
        ConfigError: it is not possible and `knn.enabled` is 'on'.
    """
    if config.knn.enabled == "off":
        return "knn.enabled is 'off'"
    if train.labels is not None and val is not None and val.labels is not None:
        return None
    if val is None:
        missing = "there are no validation images: set knn.val_root, or give a root with train and val inside"
    else:
        missing = _missing_labels("training", train) if train.labels is None else _missing_labels("validation", val)
    if config.knn.enabled == "on":
        raise ConfigError(f"config: knn.enabled is 'on', but {missing}")
    return missing


def check_labels(config: Config, train: ImageSource, val: ImageSource | None) -> None:
    """Check that there are the labels that kNN evaluation and linear probe need where they are 'on'.

    Raises:
        ConfigError: there are none.
    """
    knn_problem(config, train, val)
    if config.probe.enabled == "on" and train.labels is None:
        missing = _missing_labels("training", train)
        raise ConfigError(f"config: probe.enabled is 'on', but {missing}; or set it to 'auto'")


def _missing_labels(which: str, source: ImageSource) -> str:
    if source.label_problem:
        return f"the labels of the {which} images cannot be used: {source.label_problem}"
    return f"the {which} images have no labels: sort them into one folder per class"
