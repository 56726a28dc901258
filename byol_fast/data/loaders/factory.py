"""The loader of a configuration."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Literal

import torch

from byol_fast.config import Config, DataConfig
from byol_fast.data.batch import ViewLoader
from byol_fast.data.loaders.base import _ADVICE, PlannedLoader
from byol_fast.data.sources import ArraySource, ImageSource, SourceError

log = logging.getLogger(__name__)


def dali_installed() -> bool:
    """Whether DALI can be imported; does not import it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


_said: set[str] = set()


RESIDENT_SHARE = 0.1
"""Arrays of at most this share of a GPU's memory are kept there. Of all its memory: what is free differs from start to
start, and a resumed run should make its choice again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """The loader and the augmentation of a run: `DataConfig.loader` and `.augment` without "auto"."""

    loader: Literal["dali", "torchvision", "resident"]
    augment: Literal["kernels", "dali"]


def resolve(data: DataConfig, source: ImageSource, device: torch.device) -> Backend:
    """Decide what the configuration leaves open; figures: `benchmarks/NOTES.md`.

    Raises:
        SourceError: DALI was asked for and is not installed; `resident` was, and the images are not in memory.
    """
    if data.augment == "dali":
        if not dali_installed():
            raise SourceError(f"data.augment: dali is not installed; {_ADVICE}, or use --data.augment kernels")
        return Backend("dali", "dali")
    if data.loader == "resident" and not isinstance(source, ArraySource):
        raise SourceError(
            f"data.loader: resident must have images in memory, got {source.describe()}; give arrays (.npz), or use "
            "--data.loader auto"
        )
    if data.loader == "resident" or (data.loader == "auto" and _fits(source, device)):
        return Backend("resident", "kernels")
    return Backend(choose_backend(data.loader, device), "kernels")


def _fits(source: ImageSource, device: torch.device) -> bool:
    if device.type != "cuda" or not isinstance(source, ArraySource):
        return False
    return source.images.nbytes <= RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory


def choose_backend(loader: str, device: torch.device | None = None) -> Literal["dali", "torchvision"]:
    """Who decodes: for "auto" torchvision on a CPU, and on a GPU DALI where it is installed. Says once when it is not.

    Raises:
        SourceError: DALI was asked for by name and is not installed.
    """
    if loader == "dali":
        if dali_installed():
            return "dali"
        raise SourceError(f"data.loader: dali is not installed; {_ADVICE}, or use --data.loader torchvision")
    if loader == "torchvision" or device is None or device.type == "cpu":
        return "torchvision"
    if dali_installed():
        return "dali"
    if "no dali" not in _said:
        _said.add("no dali")
        log.warning("NVIDIA DALI is not installed: CPU threads decode the images, which is slower; %s", _ADVICE)
    return "torchvision"


def make_loader(
    source: ImageSource,
    config: Config,
    *,
    device: torch.device,
    shard_id: int = 0,
    num_shards: int = 1,
    report: Path | None = None,
) -> ViewLoader:
    """Make the loader that `config.data.loader` asks for.

    Args:
        source: the training images.
        config: of it `batch_size` (for each shard), `seed`, `view1`, `view2` and `data` are used.
        device: where the batches are wanted.
        shard_id: which part of every epoch this process takes.
        num_shards: number of parts.
        report: file that lists the bad images that are passed over (`DataConfig.on_bad`), a JSON object a line.

    Raises:
        SourceError: fewer images than one batch takes; DALI asked for and not installed.
    """
    loader: type[PlannedLoader]
    match resolve(config.data, source, device).loader:
        case "dali":
            from byol_fast.data.loaders.dali import DaliLoader

            loader = DaliLoader
        case "torchvision":
            from byol_fast.data.loaders.threaded import TorchvisionLoader

            loader = TorchvisionLoader
        case "resident":
            from byol_fast.data.loaders.device_cache import ResidentLoader

            loader = ResidentLoader
    return loader(source, config, device=device, shard_id=shard_id, num_shards=num_shards, report=report)
