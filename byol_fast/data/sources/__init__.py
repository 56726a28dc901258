"""Image sources: folders, lists, arrays, shards and datasets, with labels if there are any.

Labels are never used for training; kNN and linear probes need them.
"""

from byol_fast.data.sources.arrays import ArraySource, array_source
from byol_fast.data.sources.base import EXTENSIONS, EncodedSource, ImageSource, SourceError
from byol_fast.data.sources.datasets import DatasetSource, HuggingFaceSource
from byol_fast.data.sources.files import FileSource
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
