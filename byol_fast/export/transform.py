"""The input of an encoder from images, without augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from byol_fast.config import Preprocessing
from byol_fast.data.decode import to_rgb
from byol_fast.data.loaders.eval import center_crop
from byol_fast.models.layers import Normalize


class EvalTransform:
    """Maps an image to the input of an encoder as `byol-fast embed` does: resize, center crop, normalize.

    Args:
        metadata: of the encoder, as `load_encoder` returns it.

    Raises:
        TypeError: the metadata is no mapping.
        ConfigError: it has no valid preprocessing.

    Examples:
        >>> encoder, metadata = byol_fast.load_encoder("runs/first")
        >>> transform = byol_fast.EvalTransform(metadata)
        >>> features = encoder(transform(PIL.Image.open("photo.jpg"))[None])
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        if not isinstance(metadata, Mapping):
            raise TypeError(
                f"EvalTransform: metadata must be the metadata of an encoder, got {type(metadata).__name__}; take it "
                "from encoder, metadata = byol_fast.load_encoder(RUN)"
            )
        self.preprocessing = Preprocessing.of_metadata(metadata)
        self._normalize = Normalize(self.preprocessing.mean, self.preprocessing.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """Input of the encoder, fp32 `[3, H, W]`.

        Args:
            image: of any size and mode. EXIF rotation is not applied, as in torchvision's ImageFolder.

        Raises:
            TypeError: it is no PIL image.
            ValueError: the image is too large or too narrow, or the range of its values is not known.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"EvalTransform: image must be a PIL image, got {type(image).__name__}; make one with "
                "PIL.Image.open(path), or PIL.Image.fromarray of a uint8 array [H, W, 3]"
            )
        pixels = torch.from_numpy(center_crop(to_rgb(image), self.preprocessing))
        x: Tensor = self._normalize(pixels.permute(2, 0, 1)[None])
        return x[0]
