"""byol_fast: fast, correct BYOL pre-training.

>>> import byol_fast
>>> result = byol_fast.pretrain("photos", recipe="imagenet_resnet50_100")
>>> encoder, metadata = byol_fast.load_encoder(result.encoder)
>>> transform = byol_fast.EvalTransform(metadata)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_fast.api import pretrain
    from byol_fast.config import Config
    from byol_fast.evaluate import knn_predict
    from byol_fast.export.encoder import load_encoder
    from byol_fast.export.transform import EvalTransform
    from byol_fast.models.byol import BYOL
    from byol_fast.models.simsiam import SimSiam
    from byol_fast.training.callbacks import Callback
    from byol_fast.training.run_dir import RunResult
    from byol_fast.training.tracking import TrackerCallback
    from byol_fast.training.trainer import Trainer

__all__ = [
    "BYOL",
    "Callback",
    "Config",
    "EvalTransform",
    "RunResult",
    "SimSiam",
    "TrackerCallback",
    "Trainer",
    "knn_predict",
    "load_encoder",
    "pretrain",
]
__version__ = "0.1.0"

_MODULES = {
    "BYOL": "models",
    "Callback": "training.callbacks",
    "Config": "config",
    "EvalTransform": "export",
    "RunResult": "training.trainer",
    "SimSiam": "models",
    "TrackerCallback": "training.tracking",
    "Trainer": "training.trainer",
    "knn_predict": "evaluate",
    "load_encoder": "export",
    "pretrain": "api",
}
_SUBMODULES = {"compat", "config", "data", "evaluate", "export", "models", "optim", "trackers"}


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import on first use, so that `byol-fast --help` does not import torch."""
    if name in _SUBMODULES:
        return importlib.import_module(f"byol_fast.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'byol_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"byol_fast.{_MODULES[name]}"), name)
