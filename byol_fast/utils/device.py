"""The device of a configuration."""

from __future__ import annotations

import torch

from byol_fast.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device by `Config.device`: `auto` is the current GPU if there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("config: device is 'cuda', but torch sees no GPU; check `nvidia-smi`, or set device to 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
