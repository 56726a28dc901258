"""README and docs as a reader has them: their code blocks, the files that they name, and training that is cut short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from byol_fast import config as configs
from byol_fast.config import Config, evaluation

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
STEPS = 4
"""Length of every run, whatever its recipe and options say."""


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document in a language; "" for commands and their output."""
    return [text for kind, text in BLOCK.findall(DOCUMENTS[document]) if kind == language]


def snippet(document: str, line: str) -> str:
    """The only Python block of a document with a line that begins so."""
    (text,) = (t for t in blocks(document, "python") if re.search(f"^{re.escape(line)}", t, re.MULTILINE))
    return text


def commands() -> list[tuple[str, list[str]]]:
    """Document and words of every byol-fast command in the code blocks, with what starts it (torchrun) left out."""
    result = []
    for document in DOCUMENTS:
        for text in blocks(document, ""):
            for line in text.replace("\\\n", " ").splitlines():
                match = re.match(r"byol-fast (.*)|.*torchrun .* -m byol_fast (.*)", line)
                if match and "RECIPE" not in line:
                    result.append((document, shlex.split(match[1] or match[2], comments=True)))
    return result


def shorten_runs(patch: pytest.MonkeyPatch) -> None:
    """Cut all runs to 4 steps, or 4 more, of 8 images on the CPU, ResNet-50 at 224 px to a narrow ResNet-18 at 32 px,
    fine-tuning to an epoch, and candidates of a linear classifier to two.
    """
    check_config = Config.__post_init__
    check_finetuning, check_linear = evaluation.FinetuneSettings.__post_init__, evaluation.LinearSettings.__post_init__

    def shorten(config: Config) -> None:
        check_config(config)
        changes: dict[str, Any] = {
            "steps": config.extended_at + STEPS,
            "batch_size": min(config.batch_size, 8),
            "log_every": 1,
            "device": "cpu",
            "precision": "fp32",
            "memory_check": False,
            "data": configs.replace(config.data, {"threads": 1}),
            "model": configs.replace(config.model, {"hidden_dim": 32, "projection_dim": 16}),
        }
        if config.model.encoder == "resnet50":
            changes["model"] = configs.replace(changes["model"], {"encoder": "resnet18_narrow"})
        if config.view1.size == 224:
            changes |= {name: configs.replace(getattr(config, name), {"size": 32}) for name in ("view1", "view2")}
            changes["local_view"] = configs.replace(config.local_view, {"size": 16})
        for name, value in changes.items():
            object.__setattr__(config, name, value)

    def shorten_finetuning(settings: evaluation.FinetuneSettings) -> None:
        check_finetuning(settings)
        object.__setattr__(settings, "epochs", (1,))

    def shorten_linear(settings: evaluation.LinearSettings) -> None:
        check_linear(settings)
        object.__setattr__(settings, "l2", (1e-4, 1e-2))

    patch.setattr(Config, "__post_init__", shorten)
    patch.setattr(evaluation.LinearSettings, "__post_init__", shorten_linear)
    patch.setattr(evaluation.FinetuneSettings, "__post_init__", shorten_finetuning)


def write_reader_files(folder: Path) -> None:
    """The files that the documents name as the reader's own: two folders of images, one of them split, and a photo."""
    write_images(folder / "path/to/images", count=24, seed=0)
    write_images(folder / "photos/train", count=16, seed=1)
    write_images(folder / "photos/val", count=8, seed=2)
    (folder / "photo.jpg").write_bytes((folder / "photos/val/cat/0.jpg").read_bytes())


def write_images(folder: Path, *, count: int, seed: int = 0, size: tuple[int, int] = (130, 110)) -> None:
    """JPEGs of a width and height in two class folders."""
    pixels = torch.rand(count, 12, 12, 3, generator=torch.Generator().manual_seed(seed))
    for i, image in enumerate((pixels * 255).byte().numpy()):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(path)
