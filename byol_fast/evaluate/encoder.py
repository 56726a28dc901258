"""What is judged, and on which images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError
from byol_fast.config.evaluation import EvalSettings
from byol_fast.data import ImageSource, SourceError, eval_batches, open_source, split
from byol_fast.data.sources.base import evenly_spaced
from byol_fast.evaluate.extract import calibrated, embed
from byol_fast.export.encoder import load_encoder
from byol_fast.models.encoders import build_encoder
from byol_fast.models.layers import Normalize
from byol_fast.utils import cpu_tuning
from byol_fast.utils.precision import resolve_precision
from byol_fast.utils.progress import Progress

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Images that an untrained encoder's norms are calibrated on, as during training.
CALIBRATION_IMAGES = 10_240
# Raw pixels of larger images would be too many features to be of use.
RAW_PIXELS_SIZE = 32
EMBED_BATCH = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """An encoder, and what it takes."""

    name: str
    """What people call it."""
    encoder: nn.Module
    """Maps normalised `[B, 3, S, S]` to features."""
    image_size: int
    """Height and width of its images in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means, of values scaled to 0..1, that its input is normalised with."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized for it."""
    step: int | None = None
    """Steps it was trained for."""
    folder: Path | None = None
    """Where it lies; results belong into `eval` there."""
    run: Config | None = None
    """Configuration of its run."""
    fresh: Callable[[], nn.Module] | None = None
    """Makes the same network untrained; without it there is no untrained baseline."""

    @property
    def normalize(self) -> Normalize:
        """Turns uint8 images into its input."""
        return Normalize(self.mean, self.std)


def load_subject(path: str | Path) -> Subject:
    """A run's encoder, or an exported one.

    Args:
        path: a run folder, a folder that `byol-fast export` wrote, or an `encoder.safetensors`.

    Raises:
        FileNotFoundError: no encoder there.
        CheckpointError: a run that has no usable checkpoint yet.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"eval: {path} does not exist; give a run folder, or an encoder written by `byol-fast export`"
        )
    encoder, about = load_encoder(path)
    folder = path if path.is_dir() else path.parent
    run = configs.load(folder / "config.json") if (folder / "config.json").exists() else None

    def fresh() -> nn.Module:
        return build_encoder(
            about["encoder"],
            image_size=about["image_size"],
            cifar_stem=about["cifar_stem"],
            zero_init_residual=run is not None and run.model.zero_init_residual,
        )

    return Subject(
        name=f"{about['encoder']} of {path}",
        encoder=encoder,
        image_size=about["image_size"],
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        interpolation=about.get("interpolation", "bicubic"),
        step=about["step"],
        folder=folder,
        run=run,
        fresh=fresh,
    )


# ---- images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Images:
    """Labelled images to learn from, and others to test on; classes are numbered alike."""

    train: ImageSource
    test: ImageSource

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.classes


def open_images(subject: Subject, train: object, test: object, settings: EvalSettings) -> Images:
    """Training and test images with labels.

    Args:
        subject: whose run's own images are taken where none are given.
        train: anything `byol_fast.data.open_source` takes; a folder with `train` and `val` (or `test`) inside serves
            both. None: the run's images.
        test: likewise. None: what belongs to `train`.
        settings: of it `max_train` and `max_test` are used.

    Raises:
        ValueError: images are missing or have no labels, there is one class only, a test class is unknown to the
            training images, or both are the same images.
    """
    options = subject.run.data if subject.run is not None else configs.DataConfig()
    first: ImageSource
    second: ImageSource | None
    if test is not None and train is not None:
        first = open_source(train, arg_name="--train", options=options)
        second = open_source(test, arg_name="--test", options=options)
    else:
        first, second = _split(subject, train, options)
        if test is not None:
            second = open_source(test, arg_name="--test", options=options)
    if second is None:
        raise SourceError(
            f"eval: there must be images to test on, {first.describe()} have none beside them; give --test FOLDER"
        )
    for name, source in (("training", first), ("test", second)):
        if source.labels is None:
            raise SourceError(
                f"eval: the {name} images must have labels, {source.describe()} have none; sort them into one folder "
                "per class"
            )
    second = _numbered_alike(first, second)
    if first.fingerprint == second.fingerprint and first.sample_name(0) == second.sample_name(0):
        raise SourceError(
            f"eval: test images must be others than the training images, both are {first.describe()}; give --test"
        )
    return Images(_spaced(first, settings.max_train), _spaced(second, settings.max_test))


def _split(subject: Subject, train: object, options: configs.DataConfig) -> tuple[ImageSource, ImageSource | None]:
    """The images of a folder with both inside, or of the subject's run."""
    if isinstance(train, str | Path):
        config = Config(data=configs.replace(options, {"root": Path(train), "builtin": "none"}))
        return split(config)
    if train is not None:
        return open_source(train, arg_name="train", options=options), None
    if subject.run is None:
        raise ConfigError(
            f"eval: {subject.name} must be judged on images, and knows of none; give --train FOLDER and --test FOLDER"
        )
    if subject.run.data.root is None and subject.run.data.builtin == "none":
        raise ConfigError(
            f"eval: {subject.name} was trained on images from memory; give --train FOLDER and --test FOLDER"
        )
    return split(configs.replace(subject.run, {"knn.enabled": "auto"}))


def _numbered_alike(train: ImageSource, test: ImageSource) -> ImageSource:
    assert train.labels is not None
    assert test.labels is not None
    present = np.unique(train.labels)
    if len(present) < 2:
        raise SourceError(
            f"eval: the training images must be of two classes or more, {train.describe()} are of one; there is "
            "nothing to tell apart"
        )
    tested = [test.classes[i] for i in np.unique(test.labels).tolist()]
    known = {train.classes[i] for i in present.tolist()}
    unknown = [name for name in tested if name not in known]
    if unknown:
        raise SourceError(
            f"eval: all test classes must be among the training classes, {len(unknown)} of {len(tested)} are not "
            f"(such as {', '.join(unknown[:3])}; the training classes are {', '.join(train.classes[:3])}, ...); use "
            "the same folder names in both"
        )
    without = sorted(known.difference(tested))
    if without:
        log.warning(
            "eval: %d of %d classes have no test images (such as %s): nothing is said about them",
            len(without),
            len(known),
            ", ".join(without[:3]),
        )
    return test if train.classes == test.classes else test.with_classes(train.classes)


def _spaced(source: ImageSource, at_most: int) -> ImageSource:
    """Evenly spaced images: class folders come in the order of the classes."""
    count = len(source)
    return source if not 0 < at_most < count else source.subset(evenly_spaced(count, at_most))


def labels_of(source: ImageSource) -> Tensor:
    """Class numbers, int64 `[N]`."""
    assert source.labels is not None
    return torch.from_numpy(np.ascontiguousarray(source.labels))


# ---- features -----------------------------------------------------------------------------------------------------


class Workplace:
    """Where and how encoders run during an evaluation.

    Args:
        settings: of it `device`, `precision`, `threads` and `on_bad` are used.
        progress: shows how far it is.
    """

    def __init__(self, settings: EvalSettings, progress: Progress) -> None:
        from byol_fast.utils.device import resolve_device

        self.settings, self.progress = settings, progress
        self.device = resolve_device(settings.device)
        self.precision = resolve_precision(settings.precision, self.device)
        self.precision.apply_to_backends()

    def placed(self, network: nn.Module) -> nn.Module:
        """A copy of a network on the device, in NHWC memory, with what makes it faster there."""
        network = copy.deepcopy(network).to(self.device)
        network.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            cpu_tuning.keep_freed_memory()
            cpu_tuning.use_small_map_convolutions(network)
        return network

    def autocast(self) -> torch.autocast:
        """The arithmetic of the encoder."""
        dtype = self.precision.autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def images(self, subject: Subject, source: ImageSource, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Centre crops, uint8, and their positions in the source."""
        return eval_batches(
            source,
            size or subject.image_size,
            EMBED_BATCH,
            interpolation=subject.interpolation,
            threads=self.settings.threads,
            device=self.device,
            on_bad=self.settings.on_bad,
        )

    def features(
        self,
        subject: Subject,
        encoder: nn.Module,
        source: ImageSource,
        what: str,
        *,
        size: int | None = None,
        flip: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Features of centre crops and the labels of their images, both on the device.

        Args:
            subject: says how images become input.
            encoder: is already `placed`.
            source: images with labels.
            what: which images these are, for the progress.
            size: of the crops in pixels, other than the subject's.
            flip: mirror the images.

        Returns:
            fp32 `[N, D]` and int64 `[N]`, of the images that can be read.

        Raises:
            ValueError: a feature is not finite.
        """
        kept: list[Tensor] = []

        def images() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, index in self.progress.over(self.images(subject, source, size), len(source), what):
                kept.append(index)
                yield (batch.flip(3) if flip else batch), index

        x = embed(
            encoder,
            images(),
            normalize=subject.normalize.to(self.device),
            device=self.device,
            autocast=self.precision.autocast,
        )
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"eval: the features of {subject.name} must be finite, some are not; try --precision fp32, else the "
                "encoder is of no use"
            )
        return x, labels_of(source)[torch.cat(kept)].to(self.device)

    def untrained(self, subject: Subject, train: ImageSource, seed: int) -> nn.Module:
        """The subject's network as it was before training, its norms calibrated on the training images.

        Raises:
            ValueError: nobody knows how to make it.
        """
        network = untrained_network(subject, seed)
        calibration = self.images(subject, _spaced(train, CALIBRATION_IMAGES))
        total = min(CALIBRATION_IMAGES, len(train))
        return calibrated(
            self.placed(network),
            self.progress.over(calibration, total, "calibrating the untrained encoder"),
            normalize=subject.normalize.to(self.device),
            device=self.device,
            autocast=self.precision.autocast,
        )


def untrained_network(subject: Subject, seed: int) -> nn.Module:
    """The subject's network with new weights.

    Raises:
        ValueError: nobody knows how to make it.
    """
    if subject.fresh is None:
        raise ValueError(
            f"eval: baselines must be made of an untrained encoder, nobody knows how to make that of {subject.name}; "
            "set Subject.fresh, or leave the baselines out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return subject.fresh()


def raw_pixel_size(subject: Subject) -> int:
    """Height and width of the images whose pixels are taken as features."""
    return min(RAW_PIXELS_SIZE, subject.image_size)


def settings_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain JSON values."""
    import dataclasses

    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
