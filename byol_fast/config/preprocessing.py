"""Preprocessing of images for an encoder: stored with it, and read from there by everything that uses the encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from byol_fast.config.fields import (
    ChannelMean,
    ChannelStd,
    ConfigError,
    ImageSize,
    Interpolation,
    Range,
    check_fields,
    require,
)
from byol_fast.config.schema import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Steps from an RGB image of any size to the input of an encoder, without augmentation.

    `preprocessing` in `encoder.json`. The fields that have only one value are there for other programs.
    """

    resize: Annotated[int, Range(0, 16_384)] = 0
    """Shorter side after the resize, in pixels; the longer side keeps the aspect ratio, rounded down. 0: 256 / 224 of
    `crop`."""
    resize_mode: Literal["shorter side, unless it equals crop"] = "shorter side, unless it equals crop"
    """An image whose shorter side is `crop` already is not resized."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize."""
    antialias: bool = True
    """The filter is widened when the image gets smaller, as in PIL; always true."""
    crop: ImageSize
    """Height and width of the crop in pixels."""
    crop_mode: Literal["center"] = "center"
    """As torchvision's `center_crop`: the edges are half of what is left over, half pixels rounded to even."""
    value_range: tuple[Annotated[float, Range(0, 0)], Annotated[float, Range(1, 1)]] = (0.0, 1.0)
    """Range of the values before the normalization: bytes are divided by 255."""
    mean: tuple[ChannelMean, ChannelMean, ChannelMean] = (0.485, 0.456, 0.406)
    """Channel means (red, green, blue), subtracted from these values."""
    std: tuple[ChannelStd, ChannelStd, ChannelStd] = (0.229, 0.224, 0.225)
    """Channel standard deviations, by which the differences are divided."""

    def __post_init__(self) -> None:
        check_fields(self, "preprocessing.")
        require(self.antialias, "preprocessing.antialias", "be True", self.antialias)
        if self.resize == 0:
            object.__setattr__(self, "resize", round(self.crop * 256 / 224))
        contract = f"be at least preprocessing.crop ({self.crop})"
        require(self.resize >= self.crop, "preprocessing.resize", contract, self.resize)

    @classmethod
    def of_config(cls, config: Config) -> Preprocessing:
        """That of the evaluations of a run."""
        view, model = config.view1, config.model
        return cls(crop=view.size, interpolation=view.interpolation, mean=model.mean, std=model.std)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Preprocessing:
        """That of an encoder, from the content of its `encoder.json`.

        Raises:
            ConfigError: a field is missing, unknown or out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if "preprocessing" in metadata:
            values = metadata["preprocessing"]
            same = isinstance(values, Mapping) and sorted(values) == sorted(names)
            require(same, "preprocessing", f"have the fields {', '.join(names)}", values)
            return cls(**values)
        # Written by a version that had only these.
        try:
            values = {"crop": metadata["image_size"], "mean": metadata["mean"], "std": metadata["std"]}
        except KeyError as error:
            raise ConfigError(f"preprocessing: the encoder's metadata must have it, got no {error}") from error
        return cls(interpolation=metadata.get("interpolation", "bicubic"), **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
