"""Builds the model of a configuration."""

from __future__ import annotations

from typing import Any, assert_never

import torch

from byol_fast.config import Config
from byol_fast.models.base import SSLModel
from byol_fast.models.byol import BYOL
from byol_fast.models.simsiam import SimSiam


def build_model(config: Config) -> SSLModel:
    """The model of a configuration, with random weights.

    Args:
        config: of it `method`, `model` and the sizes of `view_configs` are used.
    """
    model = config.model
    common: dict[str, Any] = {
        "hidden_dim": model.hidden_dim,
        "projection_dim": model.projection_dim,
        "projector_layers": model.projector_layers,
        "image_size": config.view1.size,
        "other_image_sizes": [view.size for view in config.view_configs[1:]],
        "cifar_stem": model.cifar_stem,
        "zero_init_residual": model.zero_init_residual,
        "mean": model.mean,
        "std": model.std,
        "view_batching": model.view_batching,
    }
    match config.method:
        case "byol":
            return BYOL(model.encoder, hidden_bias=model.hidden_bias, last_bias=model.last_bias, **common)
        case "simsiam":
            return SimSiam(model.encoder, predictor_hidden_dim=model.predictor_hidden_dim, **common)
        case _:
            assert_never(config.method)


def model_without_values(config: Config) -> SSLModel:
    """The networks of a configuration, of which only the shapes of their tensors are used."""
    try:
        with torch.device("meta"):
            return build_model(config)
    except NotImplementedError:  # its widths are computed from tensors, as those of torchvision's RegNets
        with torch.random.fork_rng(devices=[]):
            return build_model(config)
