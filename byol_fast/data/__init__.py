"""Data: sources of images, and loaders of batches of augmented views."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_fast.data.batch import Batch, ViewLoader
    from byol_fast.data.errors import CorruptImageError, SourceError
    from byol_fast.data.loaders.eval import eval_batches
    from byol_fast.data.loaders.factory import make_loader
    from byol_fast.data.sources import ImageSource, open_source, open_train_val

__all__ = [
    "Batch",
    "CorruptImageError",
    "ImageSource",
    "SourceError",
    "ViewLoader",
    "eval_batches",
    "make_loader",
    "open_source",
    "open_train_val",
]

_MODULES = {
    "Batch": "batch",
    "CorruptImageError": "errors",
    "ImageSource": "sources",
    "SourceError": "errors",
    "ViewLoader": "batch",
    "eval_batches": "loaders.eval",
    "make_loader": "loaders.factory",
    "open_source": "sources",
    "open_train_val": "sources",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that paths are checked before torch is imported."""
    if name not in _MODULES:
        raise AttributeError(f"module 'byol_fast.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"byol_fast.data.{_MODULES[name]}"), name)
