"""Train and evaluate small networks in one tree; write digests of all tensors and all numbers as JSON.

Usage: worker.py base|now RESULT.json [PART OF A CASE'S NAME]
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

# What is called otherwise in this tree than in the base: name in the base -> name now.
RENAMED: dict[str, str] = {
    "byol_fast.cli": "byol_fast.cli.main",
    "accumulate": "grad_accum_steps",
    "optim.eta": "optim.trust_coefficient",
    "collapse_std": "embedding_std",
    "undone": "skipped",
    "library": "dali",
    "torchvision": "threaded",
    "resident": "device_cache",
    "view1.blur": "view1.blur_p",
    "view2.blur": "view2.blur_p",
    "view1.solarize": "view1.solarize_p",
    "to": "output",
    "model.views": "model.view_batching",
}
# Keys of records that are times or memory.
UNEQUAL = {
    "images_per_s",
    "images_per_second",
    "data_wait",
    "peak_memory_gib",
    "seconds",
    "date",
    "environment",
    "settings",
}

SIDE = sys.argv[1] if len(sys.argv) > 1 else "now"


def name(base: str) -> str:
    """An option, module or value by its name in the base."""
    return base if SIDE == "base" else RENAMED.get(base, base)


def translated(key: str) -> str:
    """A key of a record of this tree by its name in the base."""
    return {now: base for base, now in RENAMED.items()}.get(key, key) if SIDE == "now" else key


def options(values: dict[str, str]) -> list[str]:
    """Command-line options, by their dotted names in the base."""
    return [word for key, value in values.items() for word in (f"--{name(key)}".replace("_", "-"), name(value))]


def write_data(folder: Path) -> dict[str, Path]:
    """Smooth images of three classes as JPEGs and as arrays."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(64, 3, 7, 7, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=96, mode="bicubic", align_corners=False)
    pixels = images.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for split, offset in (("train", 0), ("val", 48)):
        for i in range(48 if split == "train" else 16):
            path = folder / "files" / split / "abc"[i % 3] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[offset + i]).resize((80 + i % 17, 96)).save(path, quality=90)
    arrays = folder / "arrays.npz"
    np.savez(arrays, images=pixels[:, ::2, ::2][:, :40, :40], labels=np.arange(64) % 3)
    return {"files": folder / "files", "arrays": arrays}


def cases(data: dict[str, Path]) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and options of each training run."""
    loaders = {
        "torchvision": {"data.root": str(data["files"]), "data.loader": "torchvision", "data.augment": "kernels"},
        "torchvision 72 px": {
            "data.root": str(data["files"]), "data.loader": "torchvision", "data.augment": "kernels",
            "view1.size": "72", "view2.size": "72",
        },
        "arrays": {"data.root": str(data["arrays"]), "data.loader": "torchvision", "data.augment": "kernels"},
        "resident": {"data.root": str(data["arrays"]), "data.loader": "resident"},
        "dali": {"data.root": str(data["files"]), "data.loader": "dali", "data.augment": "kernels"},
        "dali, own operators": {"data.root": str(data["files"]), "data.loader": "dali", "data.augment": "library"},
    }  # fmt: skip
    rest = itertools.cycle(
        [
            {"method": "byol", "precision": "fp32", "accumulate": "1"},
            {"method": "simsiam", "precision": "bf16", "accumulate": "2"},
            {"method": "byol", "precision": "bf16", "accumulate": "1"},
            {"method": "simsiam", "precision": "fp32", "accumulate": "2"},
            {"method": "byol", "precision": "fp32", "accumulate": "2"},
            {"method": "simsiam", "precision": "bf16", "accumulate": "1"},
            {"method": "byol", "precision": "bf16", "accumulate": "2"},
            {"method": "simsiam", "precision": "fp32", "accumulate": "1"},
        ]
    )
    for loader, of_loader in loaders.items():
        for setting in itertools.islice(rest, 8 if loader == "arrays" else 2):
            yield f"{loader}, {', '.join(setting.values())}", of_loader | setting
    arrays = loaders["arrays"]
    for optimizer in ("sgd", "adamw"):
        yield f"arrays, {optimizer}", arrays | {"optim.name": optimizer, "precision": "bf16"}
    yield "arrays, fp16", arrays | {"precision": "fp16"}
    yield "arrays, activation checkpointing", arrays | {"activation_checkpointing": ""}
    for views in ("separate", "concat"):
        yield f"arrays, {views} views", arrays | {"model.views": views}
    yield "two processes, fp32", arrays | {"processes": "2", "precision": "fp32", "batch_size": "6"}
    yield (
        "two processes, bf16, files",
        loaders["torchvision"] | {"processes": "2", "accumulate": "2", "batch_size": "6"},
    )


COMMON = {
    "model.encoder": "resnet18_narrow", "model.hidden_dim": "64", "model.projection_dim": "32", "view1.size": "32",
    "view2.size": "32", "view1.blur": "0.8", "view2.blur": "0.5", "view1.solarize": "0.3", "batch_size": "12",
    "steps": "12", "log_every": "3", "checkpoint_every": "6", "device": "cpu", "mode": "eager", "data.threads": "1",
    "optim.eta": "0.02", "precision": "fp32", "seed": "3", "knn.enabled": "auto", "knn.k": "5",
}  # fmt: skip


def main() -> None:
    """Run all cases."""
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    torch.set_num_threads(1)
    folder = Path(f"work_{SIDE}")
    folder.mkdir()
    os.chdir(folder)
    results: dict[str, dict[str, Any]] = {}
    data = write_data(Path.cwd())
    trained = ""
    for case, changes in cases(data):
        if only in case or not trained:  # the evaluations need a run
            run = case.replace(" ", "_").replace(",", "")
            train(run, COMMON | changes)
            trained = trained or run
            results[case] = digest_of_run(Path("runs") / run)
    for protocol in ("knn", "linear", "linear reference", "finetune", "embed"):
        if only in protocol:
            results[protocol] = evaluate(Path("runs") / trained, protocol)
    Path(sys.argv[2]).write_text(json.dumps(results))


def call(arguments: list[str]) -> None:
    """Run a command in this process."""
    cli = importlib.import_module(name("byol_fast.cli"))
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            cli.main(arguments)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{arguments}: exit code {end.code}\n{output.getvalue()}") from end


def train(run: str, settings: dict[str, str]) -> None:
    """Train by the command line, with torchrun where a case asks for processes."""
    settings = dict(settings)
    processes = settings.pop("processes", "1")
    flag = [f"--{name('activation_checkpointing')}".replace("_", "-")] if "activation_checkpointing" in settings else []
    settings.pop("activation_checkpointing", None)
    arguments = ["train", "cifar10_resnet18", *options(settings | {"out": "runs", "name": run}), *flag]
    if processes == "1":
        call(arguments)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    subprocess.run([*torchrun, __file__, SIDE, "train", *arguments], check=True)


def digest_of_run(folder: Path) -> dict[str, Any]:
    """Digests of all tensors of the last checkpoint, and the series of the metrics."""
    payload = torch.load(folder / "checkpoints" / "step_000000012.pt", map_location="cpu", weights_only=True)
    result: dict[str, Any] = {"tensors": sorted(digest(tensor) for tensor in tensors_of(payload))}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key not in UNEQUAL:
                result.setdefault(translated(key), []).append(value)
    return result


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_of(inner)


def digest(tensor: torch.Tensor) -> str:
    """Type, shape and digest of the bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def evaluate(run: Path, protocol: str) -> dict[str, Any]:
    """Numbers of an evaluation of the run's encoder on the JPEGs."""
    out = Path(protocol.replace(" ", "_"))
    if protocol == "embed":
        call(["embed", str(run), "files/val", f"--{name('to')}", "features.npz"])
        with np.load("features.npz") as arrays:
            return {key: digest(torch.from_numpy(arrays[key])) for key in ("features",)}
    words = {
        "knn": ["knn", "--baselines"],
        "linear": ["linear"],
        "linear reference": ["linear", "--protocol", "reference", "--epochs", "2", "--batch-size", "16"],
        "finetune": ["finetune", "--epochs", "2", "--batch-size", "16", "--labels", "0.5", "1.0"],
    }[protocol]
    folders = ["--train", "files/train", "--test", "files/val", "--device", "cpu", "--precision", "fp32"]
    call(["eval", words[0], str(run), *words[1:], *folders, "--threads", "1", f"--{name('to')}", str(out)])
    result: dict[str, Any] = {}
    for path in sorted(out.glob("*.json")):
        flatten(json.loads(path.read_text()), path.stem, result)
    return result


def flatten(value: Any, prefix: str, into: dict[str, Any]) -> None:
    """Nested numbers as one dictionary with dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in UNEQUAL:
                flatten(inner, f"{prefix}.{translated(key)}", into)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            flatten(inner, f"{prefix}.{i}", into)
    elif isinstance(value, int | float):
        into[prefix] = value


def without_c_path() -> contextlib.AbstractContextManager[object]:
    """Leave out the second CPU path of the base, in C, which this tree does not have."""
    if SIDE == "now":
        return contextlib.nullcontext()
    path: contextlib.AbstractContextManager[object] = importlib.import_module("byol_kernels._cpu").left_out()
    return path


if __name__ == "__main__":
    with without_c_path():
        if len(sys.argv) > 3 and sys.argv[2] == "train":  # a process of torchrun
            torch.set_num_threads(1)
            call(sys.argv[3:])
        else:
            main()
