"""Image sources: folders, lists, arrays, shards and datasets, with labels if there are any.

Labels are never used for training; kNN and linear probes need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_fast.data.errors import SourceError
    from byol_fast.data.sources.arrays import ArraySource, array_source
    from byol_fast.data.sources.base import EncodedSource, ImageSource
    from byol_fast.data.sources.datasets import DatasetSource, HuggingFaceSource
    from byol_fast.data.sources.files import FileSource
    from byol_fast.data.sources.listing import EXTENSIONS
    from byol_fast.data.sources.open import open_source, open_train_val
    from byol_fast.data.sources.parquet import ParquetSource
    from byol_fast.data.sources.tar import TarSource

__all__ = [
    "EXTENSIONS",
    "ArraySource",
    "DatasetSource",
    "EncodedSource",
    "FileSource",
    "HuggingFaceSource",
    "ImageSource",
    "ParquetSource",
    "SourceError",
    "TarSource",
    "array_source",
    "open_source",
    "open_train_val",
]

_MODULES = {
    "EXTENSIONS": "sources.listing",
    "ArraySource": "sources.arrays",
    "DatasetSource": "sources.datasets",
    "EncodedSource": "sources.base",
    "FileSource": "sources.files",
    "HuggingFaceSource": "sources.datasets",
    "ImageSource": "sources.base",
    "ParquetSource": "sources.parquet",
    "SourceError": "errors",
    "TarSource": "sources.tar",
    "array_source": "sources.arrays",
    "open_source": "sources.open",
    "open_train_val": "sources.open",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that paths are checked before torch is imported."""
    if name not in _MODULES:
        raise AttributeError(f"module 'byol_fast.data.sources' has no attribute {name!r}")
    return getattr(importlib.import_module(f"byol_fast.data.{_MODULES[name]}"), name)
