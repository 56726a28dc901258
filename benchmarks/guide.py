"""Speed of `byol_fast.compat.guide` and of the practical guide's own code (`guide_original.py`): CIFAR-10 at 224 px.

    BYOL_FAST_DATA=path/to/cifar10/train python -m benchmarks.guide [--batch-size N] [--rounds N] [--device cuda]
        [--threads N] [--save FOLDER]

Both train a ResNet-18 on the same batch of images by `train_byol`, one step per call, and make the two views of that
batch by `transform_image`. Each runs in its own process, in turns. On a CPU, CPU time of the process is measured, on a
GPU wall-clock time. Before that, both are checked to compute the same losses from the same views.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import guide_original
from byol_fast.bench.processes import Job, measure
from byol_fast.bench.results import Results
from byol_fast.compat import guide
from byol_fast.compat.guide_data import DATA_VARIABLE
from byol_fast.data import open_source
from byol_fast.models.layers import Normalize

BYOL_FAST, GUIDE = "byol_fast.compat.guide", "the guide's own code"
MODULES: dict[str, Any] = {BYOL_FAST: guide, GUIDE: guide_original}


def build_model(module: Any, seed: int = 0) -> Any:
    """A model as in the guide's script, with random weights."""
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    base = resnet18()
    return module.BYOL(base, nn.Sequential(*list(base.children())[:-1]), 512)


def load_batch(data: str, batch_size: int) -> Tensor:
    """A batch of normalized images, evenly spaced in the data set."""
    source = open_source(data)
    rows = np.linspace(0, len(source) - 1, batch_size).astype(int).tolist()
    levels = torch.cat([source.load_tensor(i) for i in rows]).contiguous()
    images: Tensor = Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)(levels)
    return images


def build_case(module_name: str, work: str, data: str, batch_size: int, device: str) -> Callable[[], object]:
    """Callable of a candidate; `work` is "step" or "views"."""
    module, images = MODULES[module_name], load_batch(data, batch_size)
    module.logger.addHandler(logging.NullHandler())
    model = build_model(module).to(device)
    if work == "views":
        return partial(module.transform_image, images, model)
    return partial(module.train_byol, model, [(images, None)], num_epochs=1)


def check() -> str:
    """Compare the losses of the same views.

    Raises:
        AssertionError: they differ.
    """
    original = build_model(guide_original).double()
    model = build_model(guide).double()
    pairs = (
        (model.online_encoder.feature_extractor, original.online_encoder[0]),
        (model.online_encoder.projector, original.online_encoder[2]),
        (model.target_encoder, model.online_encoder),
        (original.target_encoder, original.online_encoder),
        (model.predictor, original.predictor),
    )
    for module, other in pairs:
        module.load_state_dict(copy.deepcopy(other.state_dict()))
    x1, x2 = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for network in (model, original):
        p1, p2, t1, t2 = network(x1, x2)
        losses.append(network.loss((p1, p2), (t1, t2)).item())
    if not abs(losses[0] - losses[1]) < 1e-12:
        raise AssertionError(f"the losses of the same views differ: {losses}")
    return f"losses of the same views in float64: {losses[0]:.12f} and {losses[1]:.12f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get(DATA_VARIABLE), help="folder of CIFAR-10's training images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error(f"--data must name a folder of images; or set {DATA_VARIABLE}")
    print(check())
    device = torch.device(arguments.device)
    settings = {"batch_size": arguments.batch_size, "threads": arguments.threads, "view": 224, "encoder": "resnet18"}
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{arguments.rounds} interleaved rounds of {arguments.batch_size} images; load average {load}")
    results = Results("guide", device, settings)
    on_cpu = device.type == "cpu"
    for work in ("step", "views"):
        jobs = {
            name: Job(
                factory="benchmarks.guide:build_case",
                arguments={
                    "module_name": name,
                    "work": work,
                    "data": str(Path(arguments.data).absolute()),
                    "batch_size": arguments.batch_size,
                    "device": arguments.device,
                },
            )
            for name in MODULES
        }
        measurements = measure(jobs, rounds=arguments.rounds, warmup=2, threads=arguments.threads, device=device)
        for name, measurement in measurements.items():
            if measurement.failure:
                raise SystemExit(f"{name}: {measurement.failure}")
        suite = "a step: views, both networks, Adam, EMA" if work == "step" else "two views of each image"
        results.add(
            suite,
            {name: m.timing(wall=not on_cpu) for name, m in measurements.items()},
            unit="CPU-ms" if on_cpu else "ms",
            baseline=GUIDE,
            extras={name: m.extras for name, m in measurements.items()},
        )
    if arguments.save:
        for path in results.save(arguments.save):
            print(path)


if __name__ == "__main__":
    main()
