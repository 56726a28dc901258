"""Options of `byol-fast bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from byol_fast.config.fields import Device, Precision, Range, Threads, check_fields, require

MAX_PIXELS = 2**28
"""Largest number of pixels of a batch: 6 GiB for two views in fp32."""
Suite = Literal["peers", "kernels", "data", "step", "end-to-end", "stages"]
SUITES: tuple[Suite, ...] = ("peers", "kernels", "data", "step", "end-to-end", "stages")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the speed of byol_fast with plain PyTorch and other libraries.

    `byol-fast bench compare A B` compares two folders of results, `byol-fast bench cifar10` measures the time to a kNN
    accuracy.
    """

    suites: tyro.conf.Positional[tuple[Suite, ...]] = ()
    """peers: a training step of other libraries and of byol_fast; kernels: operators; data: two views of images; step:
    from the baseline's step to byol_fast's, one change at a time; end-to-end: from images to trained weights; stages:
    the CPU loader, one operation at a time. Default: all but stages."""
    recipe: str = ""
    """Take networks, image size and batch from this recipe. All candidates take two views, without local ones."""
    encoder: str = ""
    """Encoder, as in --model.encoder; by default resnet18 on a CPU and resnet50 on a GPU."""
    image_size: Annotated[int, Range(0, 8192)] = 0
    """Height and width of a view in pixels; 0: the recipe's, or 64 on a CPU and 224 on a GPU."""
    batch_size: Annotated[int, Range(0, 65_536)] = 0
    """Images per step; 0: the recipe's, or 64 on a CPU and 128 on a GPU."""
    precision: Precision = "auto"
    """Precision of byol_fast, measured in addition to fp32."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """Execution mode of byol_fast; on a GPU "auto" measures all three in the suite step."""
    images: Path | None = None
    """Folder of images for data and end-to-end; synthetic JPEGs by default."""
    device: Device = "auto"
    """Device to measure on."""
    threads: Threads = 0
    """Threads of each candidate on a CPU; 0 means 1. With 1, CPU time is measured, otherwise wall-clock time."""
    rounds: Annotated[int, Range(0, 1000)] = 0
    """Interleaved rounds that are counted; 0: from 5 to 11, depending on the suite."""
    steps_per_round: Annotated[int, Range(1, 10_000)] = 1
    """Steps per round of end-to-end."""
    data_images: Annotated[int, Range(0, 100_000)] = 0
    """Images per round of data; 0: 64 on a CPU, 1024 on a GPU. For small arrays 8 times as many."""
    kernel_images: Annotated[int, Range(0, 16_384)] = 0
    """Images of 224 px for the color and blur kernels; 0: 32 on a CPU, 512 on a GPU."""
    only: tuple[str, ...] = ()
    """Measure only kernel suites, and candidates of the other suites, whose name contains one of these."""
    save: Path | None = None
    """Folder for the results; bench/DATE-TIME by default."""

    def __post_init__(self) -> None:
        check_fields(self, "bench: ")
        pixels = self.batch_size * self.image_size**2
        require(
            pixels <= MAX_PIXELS, "bench: batch_size", f"have at most {MAX_PIXELS:,} pixels a view", self.batch_size
        )
