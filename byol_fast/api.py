"""One call from images to a trained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_fast import config as configs
from byol_fast.config import Config, ConfigError, recipes
from byol_fast.training.callbacks import Callback
from byol_fast.training.trainer import RESUMABLE_CHANGES, RunResult, Trainer
from byol_fast.utils.checkpoint import steps_in


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
            or a dataset (torchvision's, Hugging Face's, any indexable one of images): see
            `byol_fast.data.open_source`. None: the recipe's own data set.
        recipe: name of a recipe (`byol_fast.config.recipes.RECIPES`), or a `Config`.
        resume: run folder to continue, with the configuration it was started with; `recipe` then plays no part.
        callbacks: hooks into the run, see `byol_fast.Callback`.
        **overrides: fields of the configuration, nested ones as mappings: `epochs=100, optim={"lr": 0.3}`.

    Returns:
        Paths, loss and kNN accuracy of the finished run.

    Raises:
        ConfigError: unknown recipe or field, value out of contract.
        ValueError: no such data, or too little of it.

    Example:
        >>> result = byol_fast.pretrain("photos", recipe="imagenet_resnet50_100", batch_size=128)
        >>> encoder, about = byol_fast.load_encoder(result.encoder)
    """
    if resume is not None:
        config = configs.load(Path(resume) / "config.json")
    elif isinstance(recipe, Config):
        config = recipe
    else:
        config = recipes.get(str(recipe))
    folder = None if resume is None else Path(resume)
    return Trainer(configs.replace(config, overrides), data=data, resume=folder, callbacks=callbacks).fit()


def find_resumable(config: Config) -> Path | None:
    """The run folder that `--resume auto` continues: OUT/NAME, or without a name the newest unfinished run like this.

    Returns:
        A run folder with a checkpoint, or None where there is nothing to continue.
    """
    if config.name:
        folders = [config.out / config.name]
    elif config.out.is_dir():
        folders = sorted((p for p in config.out.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    else:
        folders = []
    for folder in folders:
        if not steps_in(folder / "checkpoints"):
            continue
        try:
            found = configs.load(folder / "config.json")
        except ConfigError:
            continue
        if config.name:
            return folder
        same_data = found.data.root == (config.data.root and config.data.root.expanduser().absolute())
        finished = (folder / "encoder.safetensors").exists()
        if same_data and not finished and set(configs.differences(found, config)) <= RESUMABLE_CHANGES:
            return folder
    return None
