"""Builds the loader of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from byol_fast.config import Config, ViewConfig
from byol_fast.data.batch import ViewLoader
from byol_fast.data.loaders.backend import resolve_backend
from byol_fast.data.loaders.device_cache import DeviceCacheLoader
from byol_fast.data.loaders.threaded import ThreadedLoader
from byol_fast.data.sources import ImageSource


def make_loader(
    source: ImageSource,
    config: Config,
    view_configs: tuple[ViewConfig, ...] | None = None,
    *,
    device: torch.device,
    shard_id: int = 0,
    num_shards: int = 1,
    corrupt_list: Path | None = None,
) -> ViewLoader:
    """Build the loader that `config.data.loader` asks for.

    Args:
        source: the training images.
        config: of it `batch_size` (for each shard), `seed`, `data` and, by default, its views are used.
        view_configs: configurations of one or more views; None for `config.view_configs`.
        device: where the batches go.
        shard_id: part of every epoch that this process takes.
        num_shards: number of parts.
        corrupt_list: file that lists skipped corrupt images (`DataConfig.on_corrupt`), a JSON object a line.

    Raises:
        SourceError: fewer images than one batch takes; DALI asked for and not installed.
    """
    backend = resolve_backend(config.data, source, device)
    options: dict[str, Any] = {
        "device": device,
        "shard_id": shard_id,
        "num_shards": num_shards,
        "corrupt_list": corrupt_list,
    }
    arguments = (source, config, config.view_configs if view_configs is None else view_configs)
    if backend.loader == "dali":
        from byol_fast.data.loaders.dali import DALILoader  # an optional package

        return DALILoader(*arguments, augment=backend.augment, **options)
    if backend.loader == "device_cache":
        return DeviceCacheLoader(*arguments, **options)
    return ThreadedLoader(*arguments, **options)
