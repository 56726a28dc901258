"""Choice of the loader and of the decoder."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from typing import Literal

import torch

from byol_fast.config import DataConfig
from byol_fast.data.sources import ArraySource, ImageSource, SourceError

log = logging.getLogger(__name__)

DALI_INSTALL_HINT = "pip install nvidia-dali-cuda130 (Linux), or nvidia-dali-cuda120 for CUDA 12 drivers"

DEVICE_CACHE_SHARE = 0.1
"""Largest share of a GPU's memory that arrays are kept in by default. Of all its memory, since the free part differs
from start to start and a resumed run should choose the same loader."""


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """Loader and augmentation of a run: `DataConfig.loader` and `.augment` without "auto"."""

    loader: Literal["dali", "threaded", "device_cache"]
    augment: Literal["kernels", "dali"]


def resolve_backend(data: DataConfig, source: ImageSource, device: torch.device) -> Backend:
    """Loader and augmentation for a configuration; measurements: `benchmarks/NOTES.md`.

    Raises:
        SourceError: DALI is asked for and is not installed; `device_cache` is, and the images are not in memory.
    """
    if data.augment == "dali":
        if not dali_installed():
            raise SourceError(
                f"data.augment: dali is not installed; {DALI_INSTALL_HINT}, or use --data.augment kernels"
            )
        return Backend("dali", "dali")
    if data.loader == "device_cache" and not isinstance(source, ArraySource):
        raise SourceError(
            f"data.loader: device_cache must have images in memory, got {source.describe()}; give arrays (.npz), or "
            "use --data.loader auto"
        )
    if data.loader == "device_cache" or (data.loader == "auto" and _fits_on_gpu(source, device)):
        return Backend("device_cache", "kernels")
    return Backend(resolve_decoder(data.loader, device), "kernels")


def resolve_decoder(loader: str, device: torch.device) -> Literal["dali", "threaded"]:
    """Decoder of images: for "auto" torchvision on a CPU, and on a GPU DALI if it is installed.

    Raises:
        SourceError: DALI is asked for by name and is not installed.
    """
    if loader == "dali":
        if dali_installed():
            return "dali"
        raise SourceError(f"data.loader: dali is not installed; {DALI_INSTALL_HINT}, or use --data.loader threaded")
    if loader == "threaded" or device.type == "cpu":
        return "threaded"
    if dali_installed():
        return "dali"
    _warn_without_dali()
    return "threaded"


def dali_installed() -> bool:
    """True if DALI can be imported; does not import it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _fits_on_gpu(source: ImageSource, device: torch.device) -> bool:
    if device.type != "cuda" or not isinstance(source, ArraySource):
        return False
    return source.images.nbytes <= DEVICE_CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory


@functools.cache  # once a process
def _warn_without_dali() -> None:
    log.warning("NVIDIA DALI is not installed: CPU threads decode the images, which is slower; %s", DALI_INSTALL_HINT)
