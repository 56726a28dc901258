"""Options of `byol-fast bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

Suite = Literal["peers", "kernels", "data", "step", "end-to-end", "stages"]
SUITES: tuple[Suite, ...] = ("peers", "kernels", "data", "step", "end-to-end", "stages")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and on what."""

    suites: tyro.conf.Positional[tuple[Suite, ...]] = ()
    """peers: a step beside other packages'; kernels: operators beside torch's and others'; data: two views of images;
    step: from the textbook's step to ours, one change at a time; end-to-end: from images to trained weights; stages:
    what the CPU's loader does, one thing at a time. All but the last, if none is named."""
    recipe: str = ""
    """Take networks, image size and batch from this recipe."""
    encoder: str = ""
    """Encoder, as in --model.encoder; resnet18 on a CPU and resnet50 on a GPU by default."""
    image_size: int = 0
    """Edge of a view in pixels; 0: the recipe's, or 64 on a CPU and 224 on a GPU."""
    batch_size: int = 0
    """Images of a step; 0: the recipe's, or 64 on a CPU and 128 on a GPU."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    """Arithmetic of our networks, beside fp32."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How our step runs; on a GPU "auto" measures all three in the suite step."""
    images: Path | None = None
    """Folder of images for data and end-to-end; computed photographs by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    threads: int = 0
    """Threads of each contender on a CPU; 0 is 1 there. With 1 CPU time is measured, else time by the clock."""
    rounds: int = 0
    """Interleaved rounds that count; 0: from 5 to 11, by suite."""
    steps_per_round: int = 1
    """Steps of a round of end-to-end."""
    data_images: int = 0
    """Images of a round of data; 0: 64 on a CPU, 1024 on a GPU. Small arrays: 8 times as many."""
    kernel_images: int = 0
    """Images of 224 px for the colour and blur kernels; 0: 32 on a CPU, 512 on a GPU."""
    only: tuple[str, ...] = ()
    """Suites of kernels, and contenders of the others, whose name contains one of these."""
    save: Path | None = None
    """Folder for the results; bench/DATE-TIME by default."""
