"""Labeled images of an evaluation: a training and a test set with the same class numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError, DataConfig
from byol_fast.config.evaluation import ClassifierSettings, EvalSettings
from byol_fast.data import ImageSource, SourceError, open_source, open_train_val
from byol_fast.data.sources.overlap import warn_shared_images
from byol_fast.data.sources.splits import part_of
from byol_fast.evaluate.encoder import PretrainedEncoder
from byol_fast.evaluate.splits import subsample, subsample_classes
from byol_fast.utils.files import printable_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class EvalImages:
    """Labeled training and test images; both number the classes alike."""

    train: ImageSource
    test: ImageSource

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, printable: for records and charts."""
        return tuple(map(printable_name, self.train.classes))


def open_images(pretrained: PretrainedEncoder, train: object, test: object, settings: ClassifierSettings) -> EvalImages:
    """Open the training and test images of an evaluation.

    Args:
        pretrained: the images of its run are the default.
        train: anything that `byol_fast.data.open_source` takes; a folder with `train` and `val` (or `test`) inside
            serves as both. None: the images of the run.
        test: likewise. None: the test images that belong to `train`.
        settings: `max_train`, `max_test` and `on_corrupt` are used.

    Raises:
        ValueError: images or labels are missing, there is only one class, a test class has no training images, or
            both sets are the same.
    """
    options = _options(pretrained, settings)
    train_source: ImageSource
    test_source: ImageSource | None
    if train is not None and test is not None:
        train_source = open_source(train, arg_name="--train", options=options)
        test_source = open_source(test, arg_name="--test", options=options)
    else:
        train_source, test_source = _open_both(pretrained, train, options, "--train FOLDER and --test FOLDER")
        if test is not None:
            test_source = open_source(test, arg_name="--test", options=options)
    if test_source is None:
        raise _no_test_images(train_source)
    for name, source in (("training", train_source), ("test", test_source)):
        _check_labels(source, name)
    test_source = _match_classes(train_source, test_source)
    if train_source.fingerprint == test_source.fingerprint and train_source.sample_name(0) == test_source.sample_name(
        0
    ):
        raise SourceError(
            f"eval: test images must differ from the training images, both are {train_source.describe()}; pass --test"
        )
    if test is not None:  # others are compared where they are opened
        warn_shared_images(train_source, test_source, "--test")
    return EvalImages(subsample(train_source, settings.max_train), subsample(test_source, settings.max_test))


def open_test_images(pretrained: PretrainedEncoder, test: object, settings: EvalSettings) -> ImageSource:
    """Open the test images of an evaluation without training images.

    Args:
        pretrained: the validation images of its run are the default.
        test: anything that `byol_fast.data.open_source` takes. None: the validation images of the run.
        settings: `max_test` and `on_corrupt` are used.

    Raises:
        ValueError: images or labels are missing, or there is only one class.
    """
    options = _options(pretrained, settings)
    if test is not None:
        source = open_source(test, arg_name="--test", options=options)
    else:
        train, val = _open_both(pretrained, None, options, "--test FOLDER")
        if val is None:
            raise _no_test_images(train)
        source = val
    _check_labels(source, "test")
    if all(map(part_of, source.classes)):
        folders = " and ".join(map(printable_name, source.classes))
        raise SourceError(
            f"eval: --test must have one folder per class, {source.describe()} have {folders}; pass one of these"
        )
    source = subsample_classes(source, settings.max_test)
    _check_num_classes(source, "test")
    return source


def _options(pretrained: PretrainedEncoder, settings: EvalSettings) -> DataConfig:
    options = pretrained.config.data if pretrained.config is not None else DataConfig()
    return configs.replace(options, {"on_corrupt": settings.on_corrupt})


def _no_test_images(train: ImageSource) -> SourceError:
    return SourceError(f"eval: {train.describe()} have no test images beside them; pass --test FOLDER")


def _check_labels(source: ImageSource, name: str) -> None:
    if source.labels is None:
        problem = (
            f"those of {source.describe()} cannot be used: {source.label_problem}"
            if source.label_problem
            else f"{source.describe()} have none: sort them into one folder per class"
        )
        raise SourceError(f"eval: the {name} images must have labels, {problem}")


def _check_num_classes(source: ImageSource, name: str) -> None:
    if len(np.unique(np.asarray(source.labels))) < 2:
        raise SourceError(f"eval: the {name} images must have two classes or more, {source.describe()} have one")


def _open_both(
    pretrained: PretrainedEncoder, train: object, options: DataConfig, arguments: str
) -> tuple[ImageSource, ImageSource | None]:
    """Training images, and the test images that belong to them if there are any.

    Raises:
        ConfigError: the run has none; `arguments` would name some.
    """
    if isinstance(train, str | Path):
        return open_train_val(Config(data=configs.replace(options, {"root": Path(train), "builtin": "none"})))
    if train is not None:
        return open_source(train, arg_name="train", options=options), None
    if pretrained.config is None:
        raise ConfigError(f"eval: {pretrained.name} has no run configuration that names images; give {arguments}")
    if pretrained.config.data.root is None and pretrained.config.data.builtin == "none":
        raise ConfigError(f"eval: {pretrained.name} was trained on images from memory; give {arguments}")
    return open_train_val(configs.replace(pretrained.config, {"knn.enabled": "auto", "data": options}))


def _match_classes(train: ImageSource, test: ImageSource) -> ImageSource:
    """The test images with the class numbers of the training images.

    Raises:
        SourceError: only one training class, or test classes without training images.
    """
    assert train.labels is not None
    assert test.labels is not None
    _check_num_classes(train, "training")
    train_names = {train.classes[i] for i in np.unique(train.labels).tolist()}
    test_names = [test.classes[i] for i in np.unique(test.labels).tolist()]
    unknown = [name for name in test_names if name not in train_names]
    if unknown:
        raise SourceError(
            f"eval: all test classes must be among the training classes, {len(unknown)} of {len(test_names)} are not "
            f"(such as {', '.join(map(printable_name, unknown[:3]))}; the training classes are "
            f"{', '.join(map(printable_name, train.classes[:3]))}, ...); use "
            "the same folder names in both"
        )
    untested = sorted(train_names.difference(test_names))
    if untested:
        log.warning(
            "eval: %d of %d classes have no test images (such as %s): no accuracy is reported for them",
            len(untested),
            len(train_names),
            ", ".join(map(printable_name, untested[:3])),
        )
    return test if train.classes == test.classes else test.with_classes(train.classes)


def labels_of(source: ImageSource) -> Tensor:
    """Class numbers, int64 `[N]`."""
    assert source.labels is not None
    return torch.from_numpy(np.ascontiguousarray(source.labels))
