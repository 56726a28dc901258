"""Data: sources of images, and loaders of batches of augmented views."""

from byol_fast.data.batch import Batch, ViewLoader
from byol_fast.data.integrity import CorruptImageError
from byol_fast.data.loaders.eval import eval_batches
from byol_fast.data.loaders.factory import make_loader
from byol_fast.data.sources import ImageSource, SourceError, open_source, open_train_val

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
