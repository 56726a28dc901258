"""Device selection."""

from __future__ import annotations

import torch

from byol_fast.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """Device for `Config.device`; `auto` is the current GPU if there is one, else the CPU.

    Raises:
        ConfigError: the name is `cuda` and there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "config: device='cuda' requires a GPU, but torch finds none; check `nvidia-smi`, or set device='cpu'"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
