"""Device selection, and the memory of a device."""

from __future__ import annotations

import os

import torch

from byol_fast.config import ConfigError
from byol_fast.config.fields import Device, check


def resolve_device(name: str) -> torch.device:
    """Device for `Config.device`; `auto` is the current GPU if there is one, else the CPU.

    Raises:
        ConfigError: the name is `cuda` and there is no GPU, or it is another name.
    """
    check("config: device", Device, name)
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "config: device='cuda' requires a GPU, but torch finds none; check `nvidia-smi`, or set device='cpu'"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def total_memory(device: torch.device) -> int:
    """Memory of a device in bytes; that of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
