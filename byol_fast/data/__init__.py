"""Data: sources of images, and loaders of batches of augmented views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byol_fast.utils.lazy import on_first_use

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
    "Batch": "byol_fast.data.batch",
    "CorruptImageError": "byol_fast.data.errors",
    "ImageSource": "byol_fast.data.sources",
    "SourceError": "byol_fast.data.errors",
    "ViewLoader": "byol_fast.data.batch",
    "eval_batches": "byol_fast.data.loaders.eval",
    "make_loader": "byol_fast.data.loaders.factory",
    "open_source": "byol_fast.data.sources",
    "open_train_val": "byol_fast.data.sources",
}

__getattr__ = on_first_use(__name__, _MODULES)
