"""`pretrain`: from images to a trained encoder in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config, recipes
from byol_fast.profiling.page import run_sections
from byol_fast.report.callback import ReportCallback
from byol_fast.training.callbacks import Callback
from byol_fast.training.run_dir import RunResult
from byol_fast.training.trainer import Trainer


def pretrain(
    data: object = None,
    recipe: str | Config = "imagenet_resnet50",
    *,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> RunResult:
    """Pre-train an encoder with BYOL, without labels.

    Args:
        data: folder or list of images, tar or Parquet shards, `.npz` file, uint8 array `[N, H, W, 3]` or `[N, H, W]`,
            or a dataset (torchvision, Hugging Face, any map-style dataset of images): see
            `byol_fast.data.open_source`. A folder with `train` and `val` inside is split. None: the dataset of the
            recipe.
        recipe: name of a recipe (`byol_fast.config.recipes.RECIPES`), or a `Config`.
        resume: run folder to continue with its own configuration; `recipe` is then ignored.
        callbacks: hooks called during the run, see `byol_fast.Callback`.
        **overrides: fields of the configuration, nested ones as mappings: `epochs=100, optim={"lr": 0.3}`.

    Returns:
        Paths, loss and kNN accuracy of the finished run.

    Raises:
        ConfigError: unknown recipe or field, or invalid value.
        ValueError: the data do not exist, or are too few.

    Example:
        >>> result = byol_fast.pretrain("photos", recipe="imagenet_resnet50_100", batch_size=128)
        >>> encoder, metadata = byol_fast.load_encoder(result.encoder)
    """
    if resume is not None:
        config = configs.load(Path(resume) / "config.json")
    elif isinstance(recipe, Config):
        config = recipe
    else:
        config = recipes.get(str(recipe))
    folder = None if resume is None else Path(resume)
    return Trainer(
        configs.replace(config, overrides),
        data=data,
        resume=folder,
        callbacks=[*callbacks, ReportCallback(run_sections)],
    ).fit()
