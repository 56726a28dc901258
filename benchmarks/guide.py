"""The practical guide's loop with our imports, beside its own code restated (`guide_original.py`): CIFAR-10 at 224 px.

    BYOL_FAST_DATA=path/to/cifar10/train python -m benchmarks.guide [--batch-size N] [--rounds N] [--device cuda]
        [--threads N] [--save FOLDER]

Both train a ResNet-18 on the same batch of images by `train_byol`, a step a call; and both make the two views of that
batch by `transform_image`. Each contender is a process of its own, and they take turns. On a CPU the measure is the
CPU time of the process, on a GPU time by the clock. Before that it is shown that both compute the same losses from
the same views.
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
from byol_fast.data import open_source
from byol_fast.data.loaders.threaded import decode_image
from byol_fast.models.layers import Normalize

OURS, GUIDE = "ours: byol_fast.compat", "the guide's own code, restated"
MODULES: dict[str, Any] = {OURS: guide, GUIDE: guide_original}


def model_of(module: Any, seed: int = 0) -> Any:
    """A model as the guide's script makes it, with random weights."""
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    base = resnet18()
    return module.BYOL(base, nn.Sequential(*list(base.children())[:-1]), 512)


def images_of(data: str, batch_size: int) -> Tensor:
    """A batch of images spread over the data set, normalised."""
    source = open_source(data)
    numbers = np.linspace(0, len(source) - 1, batch_size).astype(int).tolist()
    levels = torch.cat([decode_image(source, i) for i in numbers]).contiguous()
    images: Tensor = Normalize(guide.CIFAR10_MEAN, guide.CIFAR10_STD)(levels)
    return images


def make(who: str, what: str, data: str, batch_size: int, device: str) -> Callable[[], object]:
    """A contender: what it does a call."""
    module, images = MODULES[who], images_of(data, batch_size)
    module.logger.addHandler(logging.NullHandler())
    model = model_of(module).to(device)
    if what == "views":
        return partial(module.transform_image, images, model)
    return partial(module.train_byol, model, [(images, None)], num_epochs=1)


def check() -> str:
    """What shows that both compute the same from the same views; raises where they do not."""
    theirs = model_of(guide_original).double()
    ours = model_of(guide).double()
    pairs = (
        (ours.online_encoder.feature_extractor, theirs.online_encoder[0]),
        (ours.online_encoder.projector, theirs.online_encoder[2]),
        (ours.target_encoder, ours.online_encoder),
        (theirs.target_encoder, theirs.online_encoder),
        (ours.predictor, theirs.predictor),
    )
    for mine, other in pairs:
        mine.load_state_dict(copy.deepcopy(other.state_dict()))
    x1, x2 = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (ours, theirs):
        p1, p2, t1, t2 = model(x1, x2)
        losses.append(model.loss((p1, p2), (t1, t2)).item())
    if not abs(losses[0] - losses[1]) < 1e-12:
        raise AssertionError(f"the losses of the same views differ: {losses}")
    return f"losses of the same views in float64: {losses[0]:.12f} and {losses[1]:.12f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get(guide.FOLDER), help="folder of CIFAR-10's training images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error(f"--data must name a folder of images; or set {guide.FOLDER}")
    print(check())
    device = torch.device(arguments.device)
    settings = {"batch_size": arguments.batch_size, "threads": arguments.threads, "view": 224, "encoder": "resnet18"}
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{arguments.rounds} interleaved rounds of {arguments.batch_size} images; load of the machine {load}")
    results = Results("guide", device, settings)
    on_cpu = device.type == "cpu"
    for what in ("step", "views"):
        jobs = {
            who: Job(
                maker="benchmarks.guide:make",
                arguments={
                    "who": who,
                    "what": what,
                    "data": str(Path(arguments.data).absolute()),
                    "batch_size": arguments.batch_size,
                    "device": arguments.device,
                },
            )
            for who in MODULES
        }
        found = measure(jobs, rounds=arguments.rounds, warmup=2, threads=arguments.threads, device=device)
        for who, measured in found.items():
            if measured.failure:
                raise SystemExit(f"{who}: {measured.failure}")
        name = "a step: views, both networks, Adam, average" if what == "step" else "two views of each image"
        results.add(
            name,
            {who: m.timing(wall=not on_cpu) for who, m in found.items()},
            unit="CPU-ms" if on_cpu else "ms",
            baseline=GUIDE,
            extras={who: m.extras for who, m in found.items()},
        )
    if arguments.save:
        for path in results.save(arguments.save):
            print(path)


if __name__ == "__main__":
    main()
