"""byol_fast: fast, correct BYOL pre-training.

>>> import byol_fast
>>> result = byol_fast.pretrain("photos", recipe="imagenet_resnet50_100")
>>> encoder, metadata = byol_fast.load_encoder(result.encoder)
>>> transform = byol_fast.EvalTransform(metadata)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from byol_fast.utils.lazy import on_first_use

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
    "BYOL": "byol_fast.models",
    "Callback": "byol_fast.training.callbacks",
    "Config": "byol_fast.config",
    "EvalTransform": "byol_fast.export",
    "RunResult": "byol_fast.training.trainer",
    "SimSiam": "byol_fast.models",
    "TrackerCallback": "byol_fast.training.tracking",
    "Trainer": "byol_fast.training.trainer",
    "knn_predict": "byol_fast.evaluate",
    "load_encoder": "byol_fast.export",
    "pretrain": "byol_fast.api",
}
_get = on_first_use(__name__, _MODULES)
_SUBMODULES = {"compat", "config", "data", "evaluate", "export", "models", "optim", "trackers"}


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import on first use, so that `byol-fast --help` does not import torch."""
    if name in _SUBMODULES:
        return importlib.import_module(f"byol_fast.{name}")
    return _get(name)
