"""Common parts of evaluations: the device they run on, the networks they compare, and their record."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from byol_fast import config as configs
from byol_fast.config.evaluation import ClassifierSettings, EvalSettings
from byol_fast.data import ImageSource, eval_batches
from byol_fast.evaluate.encoder import PretrainedEncoder, load_pretrained
from byol_fast.evaluate.extract import CALIBRATION_IMAGES, extract_features, recalibrate_bn
from byol_fast.evaluate.images import labels_of, open_images
from byol_fast.evaluate.metrics import Scores
from byol_fast.evaluate.results import Baseline, EvalResult, Evaluation, ShotScores, write
from byol_fast.evaluate.splits import subsample
from byol_fast.utils import cpu_tuning, env
from byol_fast.utils.device import resolve_device, total_memory
from byol_fast.utils.files import check_output_folder
from byol_fast.utils.precision import resolve_precision
from byol_fast.utils.progress import Progress

log = logging.getLogger(__name__)

S = TypeVar("S", bound=EvalSettings)
C = TypeVar("C", bound=ClassifierSettings)
OnResult = Callable[[Evaluation], None]

RAW_PIXELS_SIZE = 32
"""Height and width of images whose raw pixels are the features; larger ones would have too many."""
BATCH_SIZE = 256
FEATURE_RANGE = (1e-10, 1e15)
"""Smallest and largest value that the largest feature may have: squares of others vanish or overflow in fp32."""


class EvalContext:
    """Device, precision and loading of images during an evaluation.

    Args:
        settings: `device`, `precision`, `threads` and `on_corrupt` are used.
        progress: shows progress.
    """

    def __init__(self, settings: EvalSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.device = resolve_device(settings.device)
        self.precision = resolve_precision(settings.precision, self.device)
        self.precision.apply_to_backends()

    def to_device(self, network: nn.Module) -> nn.Module:
        """A copy of a network on the device, channels_last and tuned for it."""
        network = copy.deepcopy(network).to(self.device)
        network.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            cpu_tuning.keep_freed_memory()
            cpu_tuning.use_small_map_convolutions(network)
        return network

    def autocast(self) -> torch.autocast:
        """Autocast to the precision of the settings."""
        dtype = self.precision.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def batches(
        self, pretrained: PretrainedEncoder, source: ImageSource, size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Center crops, uint8 `[B, 3, S, S]`, and their positions in the source, int64 `[B]`."""
        preprocessing = pretrained.preprocessing
        if size is not None:
            preprocessing = dataclasses.replace(preprocessing, crop=size, resize=0)
        return eval_batches(
            source,
            preprocessing,
            BATCH_SIZE,
            threads=self.settings.threads,
            device=self.device,
            on_corrupt=self.settings.on_corrupt,
        )

    def features(
        self,
        pretrained: PretrainedEncoder,
        network: nn.Module,
        source: ImageSource,
        description: str,
        *,
        size: int | None = None,
        flip: bool = False,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features of center crops, and their labels.

        Args:
            pretrained: its input format is used.
            network: the network, on the device.
            source: labeled images.
            description: text of the progress bar.
            size: height and width of the crops in pixels; None: those of `pretrained`.
            flip: mirror the images.
            transform: applied to the features of each batch; its results are returned instead.

        Returns:
            Features, fp32 `[N, D]`, and labels, int64 `[N]`, of the readable images, on the device.

        Raises:
            ValueError: a feature is not finite, or they are too large or too small to compute with.
        """
        batches = self.progress.track(self.batches(pretrained, source, size), len(source), description)
        largest = torch.zeros((), device=self.device)

        def measure_and_transform(x: Tensor) -> Tensor:
            largest.copy_(torch.maximum(largest, x.abs().max()))  # keeps NaN
            return x if transform is None else transform(x)

        x, index = extract_features(
            network,
            ((images.flip(3) if flip else images, index) for images, index in batches),
            normalize=pretrained.normalize.to(self.device),
            device=self.device,
            autocast=self.precision.autocast_dtype,
            transform=measure_and_transform,
        )
        self._check_range(float(largest), pretrained.name, is_bounded=transform is None)
        if transform is None and len(x) > 1 and torch.equal(x.amin(dim=0), x.amax(dim=0)):
            log.warning("eval: %s: all %d images have the same features; the network is collapsed", description, len(x))
        return x, labels_of(source)[index].to(self.device)

    def _check_range(self, largest: float, name: str, *, is_bounded: bool) -> None:
        if not math.isfinite(largest):
            raise ValueError(
                f"eval: the features of {name} must be finite, some are not; set --precision fp32, or check the loss "
                "of its run"
            )
        low, high = FEATURE_RANGE
        if is_bounded and largest and not low <= largest <= high:
            raise ValueError(
                f"eval: the largest feature of {name} must be {low:g} to {high:g} in size, got {largest:.3g}; its "
                "weights have diverged or vanished, use an earlier checkpoint"
            )

    def check_memory(self, num_values: int, num_classes: int) -> None:
        """Raise a ValueError for a classifier of which more fp32 values are in memory at once than the device holds."""
        needed, total = 4 * num_values, total_memory(self.device)
        if needed > total:
            raise ValueError(
                f"eval: a linear classifier of {num_classes:,} classes needs {needed / 2**30:.0f} GiB, "
                f"{self.device.type} has {total / 2**30:.0f}; check that the labels are classes, not numbers of the "
                "images, or use eval knn"
            )

    def untrained(self, pretrained: PretrainedEncoder, train: ImageSource, seed: int) -> nn.Module:
        """The encoder's network with new weights and BN statistics of the training images, on the device.

        Raises:
            ValueError: the network cannot be built.
        """
        network = self.to_device(pretrained.untrained(seed))
        source = subsample(train, CALIBRATION_IMAGES)
        batches = self.batches(pretrained, source)
        return recalibrate_bn(
            network,
            self.progress.track(batches, len(source), "calibrating the untrained encoder"),
            normalize=pretrained.normalize.to(self.device),
            device=self.device,
            autocast=self.precision.autocast_dtype,
        )


class EvalRun(Generic[S]):
    """One evaluation: an encoder, settings, and the folder for its record.

    Args:
        encoder: a run folder, an exported encoder, or a `PretrainedEncoder`.
        settings: of the protocol.
        changes: fields of the settings to replace.
        output_dir: folder for the record; None: none is written.
        progress: shows progress; None: nothing is shown.
        on_result: called with each result, after its record is written.

    Raises:
        ValueError: the settings do not fit.
        ConfigError: the folder cannot be written.
    """

    def __init__(
        self,
        encoder: str | Path | PretrainedEncoder,
        settings: S,
        changes: dict[str, Any],
        *,
        output_dir: Path | None,
        progress: Progress | None,
        on_result: Callable[[Any], None] | None,
    ) -> None:
        self.start_time = time.monotonic()
        self.settings, self.output_dir, self.on_result = configs.replace(settings, changes), output_dir, on_result
        if output_dir is not None:
            check_output_folder(output_dir, "eval", "choose another folder with --output")
        self.progress = progress or Progress()
        self.context = EvalContext(self.settings, self.progress)
        self.pretrained = encoder if isinstance(encoder, PretrainedEncoder) else load_pretrained(encoder)
        self.progress.print(f"{self.pretrained.name}, on {self.context.device} in {self.context.precision.name}")

    def entries(self, images: ImageSource, *, raw_pixels: bool = True) -> Iterator[Entry]:
        """The encoder, then the baselines of the settings: untrained encoder and raw pixels. Built when needed.

        Args:
            images: of which the untrained encoder gets its BN statistics.
            raw_pixels: False leaves out this baseline.
        """
        yield Entry("this encoder", self.context.to_device(self.pretrained.encoder), self)
        if not self.settings.baselines:
            return
        yield Entry("untrained, calibrated", self.context.untrained(self.pretrained, images, self.settings.seed), self)
        if raw_pixels:
            size = min(RAW_PIXELS_SIZE, self.pretrained.preprocessing.crop)
            yield Entry(f"raw pixels ({size} px)", nn.Flatten(), self, size)

    def origin(self, start_time: float | None = None) -> dict[str, Any]:
        """Fields of `EvalResult` that do not depend on the images.

        Args:
            start_time: start of this part of the evaluation; None: that of the evaluation.
        """
        return {
            "encoder": self.pretrained.name,
            "step": self.pretrained.step,
            "settings": {
                k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.settings).items()
            },
            "seconds": time.monotonic() - (self.start_time if start_time is None else start_time),
            "date": time.strftime("%Y-%m-%d"),
            "environment": env.describe(self.context.device)
            | {"precision": self.context.precision.name}
            | env.git_state(),
        }

    def record(self, result: EvalResult) -> None:
        """Write the record of a result, and pass the result on."""
        if self.output_dir is not None:
            for path in write(result, self.output_dir):
                self.progress.print(str(path))
        if self.on_result is not None:
            self.on_result(result)


class ClassifierRun(EvalRun[C]):
    """One evaluation of a classifier of test images, with the help of training images.

    Args:
        encoder: as for `EvalRun`.
        train: labeled training images; see `open_images`.
        test: labeled test images; see `open_images`.
        settings: of the protocol.
        changes: as for `EvalRun`.
        output_dir: as for `EvalRun`.
        progress: as for `EvalRun`.
        on_result: as for `EvalRun`.

    Raises:
        ValueError: the images or settings do not fit.
        ConfigError: the folder cannot be written.
    """

    def __init__(
        self,
        encoder: str | Path | PretrainedEncoder,
        train: object,
        test: object,
        settings: C,
        changes: dict[str, Any],
        *,
        output_dir: Path | None,
        progress: Progress | None,
        on_result: OnResult | None,
    ) -> None:
        super().__init__(encoder, settings, changes, output_dir=output_dir, progress=progress, on_result=on_result)
        with self.progress.shown():
            self.images = open_images(self.pretrained, train, test, self.settings)
        self.progress.print(f"training images: {self.images.train.describe()}")
        self.progress.print(f"test images: {self.images.test.describe()}")

    def finish(
        self,
        protocol: str,
        scores: Scores,
        *,
        chosen: dict[str, Any],
        baselines: Sequence[Baseline],
        curve: Sequence[tuple[float, float]],
        curve_label: str,
        shots: Sequence[ShotScores] = (),
        num_train: int | None = None,
        start_time: float | None = None,
    ) -> Evaluation:
        """Build the result and write its record.

        Args:
            protocol: name of the record's file.
            scores: on the test images.
            chosen: hyperparameters and other facts.
            baselines: scores of the baselines.
            curve: points (x, top-1).
            curve_label: name of x.
            shots: scores with few training images per class.
            num_train: number of training images used; None: all.
            start_time: as for `origin`.
        """
        evaluation = Evaluation(
            protocol=protocol,
            train=self.images.train.describe(),
            test=self.images.test.describe(),
            num_train=len(self.images.train) if num_train is None else num_train,
            num_test=int(scores.confusion[:, 2].sum()),
            classes=self.images.classes,
            scores=scores,
            chosen=chosen,
            baselines=tuple(baselines),
            curve=tuple(curve),
            curve_label=curve_label,
            shots=tuple(shots),
            **self.origin(start_time),
        )
        self.record(evaluation)
        return evaluation


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A network of an evaluation: the encoder itself or a baseline."""

    name: str
    network: nn.Module
    """On the device."""
    run: EvalRun[Any]
    size: int | None = None
    """Height and width of its images in pixels; None: those of the encoder."""

    def features(self, source: ImageSource, description: str, *, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Features and labels; see `EvalContext.features`."""
        description = f"{self.name}: {description}"
        context, pretrained = self.run.context, self.run.pretrained
        return context.features(pretrained, self.network, source, description, size=self.size, flip=flip)
