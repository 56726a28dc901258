"""`pretrain`: from images to a trained encoder in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError, DataConfig, recipes
from byol_fast.config.resnets import RESNET_OPTIONS
from byol_fast.training.callbacks import Callback, check_callbacks
from byol_fast.training.extend import extend_config
from byol_fast.training.preflight import check_start
from byol_fast.utils.env import is_first_process

if TYPE_CHECKING:
    from byol_fast.training.run_dir import RunResult


def pretrain(
    data: object = None,
    /,
    recipe: str | Config = "imagenet_resnet50",
    *,
    resume: str | Path | None = None,
    extend: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    image_size: int | None = None,
    **overrides: Any,
) -> RunResult:
    """Pre-train an encoder with BYOL, without labels.

    Args:
        data: folder or list of images, tar or Parquet shards, `.npz` file, uint8 array `[N, H, W, 3]` or `[N, H, W]`,
            or a dataset (torchvision, Hugging Face, any map-style dataset of images): see
            `byol_fast.data.open_source`. A folder with `train` and `val` inside is split. None: the dataset of the
            recipe. `data=` takes them, too, unless it is a mapping: that is the group `data` of the configuration.
        recipe: name of a recipe (`byol_fast.config.recipes.RECIPES`), or a `Config`.
        resume: run folder to continue with its own configuration; `recipe` is then ignored.
        extend: finished run to go on from in a new folder, with its configuration and `epochs` or `steps`, the total of
            both; `recipe` is then ignored.
        callbacks: hooks called during the run, see `byol_fast.Callback`.
        image_size: height and width of the global views in pixels, short for `size` of `view1` and `view2`.
        **overrides: fields of the configuration, nested ones as mappings: `epochs=100, data={"threads": 1}`.

    Returns:
        Paths, loss and kNN accuracy of the finished run.

    Raises:
        ConfigError: unknown recipe or field, or invalid value; the images are given twice; `extend` is not finished.
        ValueError: the data do not exist, or are too few.
        TypeError: a callback is no `byol_fast.Callback`.

    Examples:
        >>> result = byol_fast.pretrain("photos", recipe="imagenet_resnet50_100", batch_size=128)
        >>> encoder, metadata = byol_fast.load_encoder(result.encoder)
    """
    data, callbacks = _take_images(data, overrides), check_callbacks(callbacks)
    if resume is not None:
        if extend is not None:
            raise ConfigError("pretrain: extend must not be given beside resume, it begins a new run; drop one of them")
        config = configs.load(Path(resume) / "config.json")
    elif extend is not None:
        config = extend_config(Path(extend), has_total=bool({"epochs", "steps"} & overrides.keys()))
    elif isinstance(recipe, Config):
        config = recipe
    else:
        config = recipes.get(str(recipe))
    if image_size is not None:
        if given := [name for name in ("view1", "view2") if _is_given(name, "size", overrides)]:
            raise ConfigError(
                f"pretrain: image_size must not be given beside the size of {given[0]}, it sets that of both views; "
                "drop one of them"
            )
        config = configs.with_image_size(config, image_size)
    base, config = config, configs.replace(config, overrides)
    if config.model.encoder != base.model.encoder:
        options = {f"model.{name}" for name in RESNET_OPTIONS if _is_given("model", name, overrides)}
        config = recipes.drop_resnet_options(config, options)
    folder = None if resume is None else Path(resume)
    if is_first_process():  # it checks for all
        check_start(config, data=data, resume=folder)

    from byol_fast.profiling.page import run_sections  # these import torch
    from byol_fast.report.callback import ReportCallback
    from byol_fast.training.trainer import Trainer

    # The report first, so that trackers of the caller's get it.
    return Trainer(config, data=data, resume=folder, callbacks=[ReportCallback(run_sections), *callbacks]).fit()


def _take_images(first: object, overrides: dict[str, Any]) -> object:
    """The images: the first argument, or `data=`, which is removed from the overrides unless it is a group of options.

    Raises:
        ConfigError: they are given twice.
    """
    places = [] if first is None else ["the first argument"]
    if _is_given("data", "root", overrides):
        places.append("data.root")
    elif not isinstance(overrides.get("data", {}), Mapping | DataConfig):
        named = overrides.pop("data")
        places += [] if named is None else ["data="]
        first = named if first is None else first
    if len(places) > 1:
        raise ConfigError(f"pretrain: the images must be given once, got {' and '.join(places)}; drop one of them")
    return first


def _is_given(group: str, name: str, overrides: Mapping[str, object]) -> bool:
    fields = overrides.get(group)
    return f"{group}.{name}" in overrides or (isinstance(fields, Mapping) and name in fields)
