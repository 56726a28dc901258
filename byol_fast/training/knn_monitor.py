"""kNN evaluation of the online encoder during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.config import Config, ConfigError
from byol_fast.data import ImageSource, eval_batches
from byol_fast.data.sources.base import evenly_spaced
from byol_fast.evaluate.extract import calibrated, embed
from byol_fast.evaluate.knn import KNNResult, knn_accuracy
from byol_fast.evaluate.rankme import rankme, spread_rows
from byol_fast.models.base import SSLModel
from byol_fast.training.online_probe import OnlineProbe

# Images that the norms of an untrained encoder are calibrated on.
CALIBRATION_IMAGES = 10_240


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """Quality of an encoder at one step of a run."""

    knn: KNNResult
    """Nearest neighbors among the training images."""
    rankme: float
    """Effective rank of the training images' features; see `byol_fast.evaluate.rankme`."""
    probe_top1: float | None
    """Accuracy of the online probe on the validation images, 0..1; None without a trained probe."""

    def summary(self, k: int) -> str:
        """One line for the terminal.

        Args:
            k: neighbors that vote.
        """
        probe = "" if self.probe_top1 is None else f"linear probe {self.probe_top1:.1%}, "
        return (
            f"kNN-{k} top-1 {self.knn.top1:.1%}, {probe}on {self.knn.num_test} images; RankMe {self.rankme:.0f} on the "
            "training images"
        )

    def to_dict(self, k: int) -> dict[str, float | None]:
        """Values for the metrics file.

        Args:
            k: neighbors that vote.
        """
        values = {
            "knn_top1": self.knn.top1,
            "knn_top5": self.knn.top5,
            "knn_k": k,
            "rankme": self.rankme if math.isfinite(self.rankme) else None,
        }
        return values if self.probe_top1 is None else values | {"probe_val_top1": self.probe_top1}


class KNNMonitor:
    """The kNN accuracy of a model's encoder on a run's images, and what else their features tell.

    Args:
        config: of it `knn`, `view1`, `data` are used.
        model: whose encoder is judged.
        train: training images, with labels.
        val: validation images, with labels.
        device: where the model is.
        autocast: dtype to compute in; None leaves the weights' own.
        probe: the linear classifier that learns beside the encoder.
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

    def __call__(self, *, untrained: bool, check: Callable[[], None]) -> EvalMetrics:
        """Evaluate the encoder as it is now.

        Args:
            untrained: calibrate the batch norms first (on a copy): an untrained network's are meaningless.
            check: called before every batch; may raise to stop.
        """
        knn, encoder = self.config.knn, self.model.encoder
        train, index = self._spaced(knn.max_train)
        common: dict[str, Any] = {
            "normalize": self.model.normalize,
            "device": self.device,
            "autocast": self.autocast,
            "check": check,
        }
        if untrained:
            encoder = calibrated(encoder, self._images(self._spaced(CALIBRATION_IMAGES)[0]), **common)
        train_x, kept = self._features(encoder, train, **common)
        val_x, val_kept = self._features(encoder, self.val, **common)
        val_y = torch.as_tensor(self.val.labels)[val_kept]
        accuracy = knn_accuracy(
            train_x,
            torch.as_tensor(self.train.labels)[index][kept].to(self.device),
            val_x,
            val_y,
            k=knn.k,
            temperature=knn.temperature,
            num_classes=len(self.train.classes),
        )
        learned = self.probe is not None and self.probe.steps > 0
        return EvalMetrics(
            knn=accuracy,
            rankme=rankme(spread_rows(train_x)),
            probe_top1=self.probe.top1(val_x, val_y) if self.probe is not None and learned else None,
        )

    def _features(self, encoder: nn.Module, source: ImageSource, **common: Any) -> tuple[Tensor, Tensor]:
        """Features, and the positions of their images: bad ones are left out where the run passes them over."""
        kept: list[Tensor] = []

        def images() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, index in self._images(source):
                kept.append(index)
                yield batch, index

        features = embed(encoder, images(), **common)
        return features, torch.cat(kept)

    def _spaced(self, at_most: int) -> tuple[ImageSource, Tensor]:
        """Evenly spaced training images (class folders come in the order of the classes), and their positions."""
        count = len(self.train)
        index = evenly_spaced(count, at_most or count)
        return self.train if len(index) == count else self.train.subset(index), torch.from_numpy(index)

    def _images(self, source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
        view, data = self.config.view1, self.config.data
        return eval_batches(
            source,
            view.size,
            256,
            interpolation=view.interpolation,
            threads=data.threads,
            loader=data.loader,
            device=self.device,
            on_bad=data.on_bad,
        )


def knn_problem(config: Config, train: ImageSource, val: ImageSource | None) -> str | None:
    """What stands against kNN evaluation; None when nothing does.

    Raises:
        ConfigError: it is asked for and cannot be.
    """
    if config.knn.enabled == "off":
        return "knn.enabled is 'off'"
    if train.labels is not None and val is not None and val.labels is not None:
        return None
    if val is None:
        missing = "there are no validation images: set knn.val_root, or give a root with train and val inside"
    else:
        which = "training" if train.labels is None else "validation"
        missing = f"the {which} images have no labels: sort them into one folder per class"
    if config.knn.enabled == "on":
        raise ConfigError(f"config: knn.enabled is 'on', but {missing}")
    return missing
