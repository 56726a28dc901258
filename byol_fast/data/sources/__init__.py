"""Image sources: folders, lists, arrays, shards and datasets, with labels if there are any.

Labels are never used for training; kNN and linear probes need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from byol_fast.utils.lazy import on_first_use

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
    "EXTENSIONS": "byol_fast.data.sources.listing",
    "ArraySource": "byol_fast.data.sources.arrays",
    "DatasetSource": "byol_fast.data.sources.datasets",
    "EncodedSource": "byol_fast.data.sources.base",
    "FileSource": "byol_fast.data.sources.files",
    "HuggingFaceSource": "byol_fast.data.sources.datasets",
    "ImageSource": "byol_fast.data.sources.base",
    "ParquetSource": "byol_fast.data.sources.parquet",
    "SourceError": "byol_fast.data.errors",
    "TarSource": "byol_fast.data.sources.tar",
    "array_source": "byol_fast.data.sources.arrays",
    "open_source": "byol_fast.data.sources.open",
    "open_train_val": "byol_fast.data.sources.open",
}

__getattr__ = on_first_use(__name__, _MODULES)
