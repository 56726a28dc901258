"""Configuration of a run: documented and validated frozen dataclasses, recipes, JSON and overrides."""

from byol_fast.config.fields import ConfigError
from byol_fast.config.io import differences, from_dict, load, replace, to_dict, with_image_size, without_paths
from byol_fast.config.preprocessing import Preprocessing
from byol_fast.config.schema import (
    Config,
    DataConfig,
    KNNConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    TauConfig,
)
from byol_fast.config.views import ViewConfig

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "KNNConfig",
    "ModelConfig",
    "OptimConfig",
    "Preprocessing",
    "ProbeConfig",
    "TauConfig",
    "ViewConfig",
    "differences",
    "from_dict",
    "load",
    "replace",
    "to_dict",
    "with_image_size",
    "without_paths",
]
